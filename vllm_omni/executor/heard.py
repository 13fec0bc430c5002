"""What executors have in common whose reports come from a thread of their own: one that runs the engine, or listens to
where it runs.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from vllm_omni.engine.base import Activity, EngineContext, StageSpec
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.orders import Report
from vllm_omni.executor.served import ServedExecutor

SHUTDOWN_S = 10.0  # the most that is waited for, to leave no thread behind


class HeardExecutor(ServedExecutor):
    """Everything that the loop's thread and its own touch is guarded by `_changed`."""

    def __init__(self, spec: StageSpec, context: EngineContext, commons: Commons, blueprint: StageBlueprint) -> None:
        super().__init__(spec, context, commons, blueprint)
        self._changed = threading.Condition()
        self._reports: list[Report] = []
        self._loaded: Future[None] = Future()
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def is_loaded(self) -> bool:
        if self._loaded.done():
            self._loaded.result()
        return self._loaded.done()

    def ensure_loaded(self) -> None:
        self._loaded.result()

    def _receive(self) -> list[Report]:
        with self._changed:
            reports, self._reports = self._reports, []
            return reports

    def _wait_for_report(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._reports, timeout_s)

    def _hear(self, report: Report | None) -> None:
        """In the thread of its own. None: there is nothing to report."""
        if report is not None:
            with self._changed:
                self._reports.append(report)
                self._changed.notify_all()
            self._wake()

    def _hear_of_breakdown(self, error: Exception) -> None:
        """Nothing follows."""
        self._hear(Report(0, Activity.IDLE.value, breakdown=error))
