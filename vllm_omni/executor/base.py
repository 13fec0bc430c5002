"""The contract of a stage executor: where a stage's engine runs. The loop above it is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from vllm_omni.engine.base import Activity, EngineContext, StageSpec
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.payload import StreamChunk


class StageExecutor(ABC):
    """Hosts the engine of one stage. No method blocks for longer than one engine step; an executor whose engine runs
    elsewhere calls `wake` when there is something to poll.
    """

    @abstractmethod
    def __init__(self, spec: StageSpec, context: EngineContext, wake: Callable[[], None]) -> None:
        """Takes down what to host; `start` does the work."""

    @abstractmethod
    def start(self) -> None:
        """Loads the engine."""

    @abstractmethod
    def submit(self, task: StageTask) -> None:
        """As StageEngine.submit."""

    @abstractmethod
    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """As StageEngine.feed."""

    @abstractmethod
    def pause(self, request_id: str) -> None:
        """As StageEngine.pause."""

    @abstractmethod
    def resume(self, request_id: str) -> None:
        """As StageEngine.resume."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """As StageEngine.abort: no event of the task follows."""

    @abstractmethod
    def poll(self) -> list[StageEvent]:
        """Events since the last poll; an inline executor runs one engine step here."""

    @abstractmethod
    def activity(self) -> Activity:
        """BUSY: `poll` would do or bring something. PENDING: `wake` will be called when it would. IDLE: only an order
        can change that.
        """

    @abstractmethod
    def get_stats(self) -> Mapping[str, Any]:
        """As StageEngine.get_stats."""

    @abstractmethod
    def check_integrity(self) -> None:
        """As StageEngine.check_integrity."""

    @abstractmethod
    def shutdown(self) -> None:
        """Frees the engine; may be called twice."""
