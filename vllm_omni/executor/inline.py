"""An executor that hosts its engine in the caller's thread: a debugger works, tensors pass by reference."""

from __future__ import annotations

from typing import Any

from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.base import EngineContext, StageEngine, StageEvent, StageTask
from vllm_omni.errors import StageError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.params import StageParams
from vllm_omni.payload import StreamChunk
from vllm_omni.request import OmniRequest


class InlineExecutor(StageExecutor):
    """`poll` runs one engine step; every call is a plain call of the engine's method."""

    def __init__(self, engine_class: type[StageEngine], stage: StageConfig, context: EngineContext) -> None:
        self._engine_class = engine_class
        self._stage = stage
        self._context = context
        self._engine: StageEngine | None = None

    def start(self) -> None:
        if self._engine is None:
            self._engine = self._engine_class(self._stage, self._context)

    def check(self, request: OmniRequest, params: StageParams) -> None:
        self._started().check(request, params)

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        return self._started().job_size(request, params)

    def submit(self, task: StageTask) -> None:
        self._started().submit(task)

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        self._started().feed(request_id, port, chunk)

    def pause(self, request_id: str) -> None:
        self._started().pause(request_id)

    def resume(self, request_id: str) -> None:
        self._started().resume(request_id)

    def poll(self) -> list[StageEvent]:
        engine = self._started()
        return engine.step() if engine.has_work() else []

    def abort(self, request_id: str) -> None:
        self._started().abort(request_id)

    def has_work(self) -> bool:
        return self._engine is not None and self._engine.has_work()

    def get_stats(self) -> dict[str, Any]:
        return {} if self._engine is None else self._engine.get_stats()

    def check_integrity(self) -> None:
        self._started().check_integrity()

    def shutdown(self) -> None:
        self._engine = None

    def _started(self) -> StageEngine:
        if self._engine is None:
            raise StageError(f"stage {self._stage.name!r}: not started, or shut down")
        return self._engine
