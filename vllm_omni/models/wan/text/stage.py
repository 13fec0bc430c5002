"""The running `umt5` stage: one text at a time, in the order in which they came, so that none is padded."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_omni.engine.base import Activity, EngineContext, StageEngine
from vllm_omni.engine.boundary import as_stage_error
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageTask
from vllm_omni.models.wan.text.encoder import UMT5Encoder
from vllm_omni.payload import StagePayload

if TYPE_CHECKING:
    from vllm_omni.models.wan.text.spec import UMT5Spec


class UMT5Engine(StageEngine):
    """Made by `UMT5Spec.load`."""

    def __init__(self, spec: UMT5Spec, context: EngineContext) -> None:
        self._spec = spec
        key = (UMT5Encoder.__name__, spec.folder.resolve(), spec.stage.variant, context.device, context.dtype)
        self._encoder = context.models.get(
            key,
            lambda: UMT5Encoder.load(spec.folder, spec.config, context.device, context.dtype, spec.stage.variant),
        )
        self._tasks: deque[StageTask] = deque()

    def submit(self, task: StageTask) -> None:
        self._tasks.append(task)

    def step(self) -> list[StageEvent]:
        if not self._tasks:
            return []
        task, name = self._tasks.popleft(), self._spec.stage.name
        try:
            tokens = self._spec.tokens(task.inputs["prompt"]) if "prompt" in task.inputs else task.prepared
            payload = StagePayload(task.request_id, name, {"hidden_states": self._encoder.encode(tokens)}, {})
            return [StageDone(payload, {"steps": 1, "tokens": len(tokens)})]
        except Exception as error:
            return [StageFailed(task.request_id, as_stage_error(name, error))]

    def abort(self, request_id: str) -> None:
        self._tasks = deque(task for task in self._tasks if task.request_id != request_id)

    def activity(self) -> Activity:
        return Activity.BUSY if self._tasks else Activity.IDLE

    def get_stats(self) -> Mapping[str, Any]:
        return {"queued": len(self._tasks)}
