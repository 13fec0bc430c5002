"""What the process of a stage does around its servant: knows the stage kinds that its parent knows, fills in the tasks
that come, sends log lines. Knows no transport.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from vllm_omni import registry
from vllm_omni.engine.base import StageSpec
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.process.protocol import LogLine, Surroundings
from vllm_omni.messages import StageTask


def settle(surroundings: Surroundings, log: Callable[[LogLine], None]) -> None:
    """Takes over the parent's registry and the level of its log. log: takes lines for that, from any thread."""
    for table, rows in surroundings.rows.items():
        for name, target in rows.items():
            registry.register(table, name, target)
    logging.basicConfig(level=surroundings.log_level, format="%(message)s", handlers=[_ToParent(log)], force=True)


class Preparing:
    """What did not travel of `StageTask.prepared` is made again here, of the same request."""

    def __init__(self, spec: StageSpec, blueprint: StageBlueprint) -> None:
        self._spec = spec
        self._reads = blueprint.reads

    def __call__(self, task: StageTask) -> StageTask:
        if task.prepared is not None:
            return task
        return dataclasses.replace(task, prepared=self._spec.check(task.request, task.params, self._reads))


class _ToParent(logging.Handler):
    """Log records of this process go into the parent's log."""

    def __init__(self, log: Callable[[LogLine], None]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log(LogLine(record.name, record.levelno, self.format(record)))
        except Exception:
            self.handleError(record)
