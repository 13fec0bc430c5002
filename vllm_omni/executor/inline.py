"""An executor that hosts its engine in the caller's thread: a debugger works, tensors pass by reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.engine.base import Activity, EngineContext, StageEngine, StageSpec
from vllm_omni.errors import StageError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.payload import StagePayload, StreamChunk


class InlineExecutor(StageExecutor):
    """`poll` runs one engine step; every call is a plain call of the engine's method. A step that hangs cannot be
    interrupted: it holds the caller.
    """

    def __init__(self, spec: StageSpec, context: EngineContext, commons: Commons, blueprint: StageBlueprint) -> None:
        self._spec = spec
        self._context = context
        self._engine: StageEngine | None = None

    def start(self) -> None:
        if self._engine is None:
            self._engine = self._spec.load(self._context)

    def is_loaded(self) -> bool:
        return self._engine is not None

    def ensure_loaded(self) -> None:
        self.start()

    def submit(self, task: StageTask) -> None:
        self._started.submit(task)

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        self._started.feed(request_id, port, chunk)

    def pause(self, request_id: str) -> None:
        self._started.pause(request_id)

    def resume(self, request_id: str) -> None:
        self._started.resume(request_id)

    def abort(self, request_id: str) -> None:
        self._started.abort(request_id)

    def partial_result(self, request_id: str) -> StagePayload | None:
        return self._started.partial_result(request_id)

    def save_state(self, request_id: str) -> Mapping[str, Any] | None:
        return self._started.save_state(request_id)

    def poll(self) -> list[StageEvent]:
        engine = self._started
        return engine.step() if engine.activity() is Activity.BUSY else []

    def activity(self) -> Activity:
        return Activity.IDLE if self._engine is None else self._engine.activity()

    def responds(self) -> bool:
        return True

    def breakdown(self) -> Exception | None:
        return None

    def get_stats(self) -> Mapping[str, Any]:
        return {} if self._engine is None else self._engine.get_stats()

    def check_integrity(self) -> None:
        self._started.check_integrity()

    def shutdown(self, *, wait: bool = True) -> None:
        self._engine = None

    @property
    def _started(self) -> StageEngine:
        if self._engine is None:
            raise StageError(f"stage {self._spec.stage.name!r}: not started, or shut down")
        return self._engine
