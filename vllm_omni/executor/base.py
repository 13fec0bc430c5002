"""The contract of a stage executor: where a stage's engine runs. The loop above it is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.base import EngineContext, StageEngine, StageEvent, StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StreamChunk
from vllm_omni.request import OmniRequest


class StageExecutor(ABC):
    """Hosts one engine. `poll` never blocks for longer than one engine step."""

    @abstractmethod
    def __init__(self, engine_class: type[StageEngine], stage: StageConfig, context: EngineContext) -> None:
        """Notes what to host; `start` does the work."""

    @abstractmethod
    def start(self) -> None:
        """Loads the engine."""

    @abstractmethod
    def check(self, request: OmniRequest, params: StageParams) -> None:
        """As StageEngine.check."""

    @abstractmethod
    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        """As StageEngine.job_size."""

    @abstractmethod
    def submit(self, task: StageTask) -> None: ...

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
    def poll(self) -> list[StageEvent]:
        """Events since the last poll; an inline executor runs one engine step here."""

    @abstractmethod
    def abort(self, request_id: str) -> None: ...

    @abstractmethod
    def has_work(self) -> bool: ...

    @abstractmethod
    def get_stats(self) -> dict[str, Any]: ...

    @abstractmethod
    def check_integrity(self) -> None: ...

    @abstractmethod
    def shutdown(self) -> None:
        """Frees the engine; may be called twice."""
