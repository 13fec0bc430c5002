"""Where the engines of stages are: which process each is in, and how that is begun."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_omni import registry
from vllm_omni.config.schema import PROCESS, StageConfig
from vllm_omni.utils.device import is_cpu, resolve_device

if TYPE_CHECKING:
    from vllm_omni.executor.base import StageExecutor

Home = tuple[str, str, int]  # whose it is, "stage" or "process", that one's name, and of which replica


def runs_apart(stage: StageConfig) -> bool:
    """Whether the stage's engine is in a process of its own, which shares no memory for weights."""
    if stage.executor == "auto":  # which picks among those of this process
        return False
    executor: type[StageExecutor] = registry.resolve("executor", stage.executor)
    return not executor.shares_memory


def home_of(stage: StageConfig, replica: int) -> Home | None:
    """Which process a replica of the stage is in; None: that of the loop."""
    if not runs_apart(stage):
        return None
    return ("stage", stage.name, replica) if stage.process is None else ("process", stage.process, replica)


def is_on_cpu(stage: StageConfig) -> bool:
    """Whether all of its replicas compute there."""
    return all(is_cpu(resolve_device(device)) for device in stage.replica_devices)


def is_forked(stage: StageConfig, stages: Iterable[StageConfig]) -> bool:
    """Whether its process is: it is one of this machine's, and no stage in it uses an accelerator.

    stages: all of its pipeline.
    """
    return stage.executor == PROCESS and all(
        is_on_cpu(each) for each in stages if home_of(each, 0) == home_of(stage, 0)
    )
