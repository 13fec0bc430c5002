"""The adapter stage: any pipeline of diffusers, hosted as it is. Each step runs one denoising step of one request.

Requests run one after another, since a pipeline is made for one call at a time; a model that has a DiffusionModel of
its own (kind `dit`) runs them together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_omni.engine.base import Activity, EngineContext, StageEngine
from vllm_omni.engine.boundary import stage_error
from vllm_omni.engine.diffusers.pipeline_folder import load_pipeline, sample_rate
from vllm_omni.engine.diffusers.pipeline_host import PipelineHost, PipelineRun
from vllm_omni.engine.diffusers.spec import DiffusersSpec
from vllm_omni.engine.diffusion.checks import diffusion_params
from vllm_omni.errors import InvalidRequestError, OmniError, StageError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageProgress, StageTask
from vllm_omni.payload import StagePayload


@dataclass(frozen=True, slots=True)
class _Running:
    """The request whose call is under way."""

    task: StageTask
    run: PipelineRun


class DiffusersEngine(StageEngine):
    """Stage kind `diffusers`."""

    def __init__(self, spec: DiffusersSpec, context: EngineContext) -> None:
        folder, name = spec.folder, spec.pipeline_name
        pipeline = context.models.get(
            (name, folder.resolve(), context.device, context.dtype),
            lambda: load_pipeline(folder, name, context.device, context.dtype),
        )
        self.spec = spec
        self.host = PipelineHost(pipeline)
        self._meta = {"sample_rate": sample_rate(pipeline)} if spec.output == "audio" else {}
        self._queue: deque[StageTask] = deque()
        self._running: _Running | None = None
        self._events: deque[StageEvent] = deque()

    def submit(self, task: StageTask) -> None:
        self._queue.append(task)

    def step(self) -> list[StageEvent]:
        if self._running is None and self._queue:
            self._begin(self._queue.popleft())
        if self._running is not None:
            self._advance(self._running)
        events, self._events = list(self._events), deque()
        return events

    def abort(self, request_id: str) -> None:
        self._queue = deque(task for task in self._queue if task.request_id != request_id)
        if self._running is not None and self._running.task.request_id == request_id:
            run, self._running = self._running.run, None
            run.close()
            self.host.restore()

    def activity(self) -> Activity:
        return Activity.BUSY if self._running is not None or self._queue or self._events else Activity.IDLE

    def get_stats(self) -> dict[str, Any]:
        return {"running": int(self._running is not None), "queued": len(self._queue)}

    def _begin(self, task: StageTask) -> None:
        try:
            params, prompt = diffusion_params(task.params), task.inputs.get("prompt", task.request.prompt)
            if not isinstance(prompt, str):
                raise InvalidRequestError(f"prompt: got {type(prompt).__name__}, expected a string")
            arguments = self.spec.call.arguments(prompt, task.request, params)
            self._running = _Running(task, self.host.begin(arguments, self.spec.call.num_steps(params)))
        except Exception as error:
            self._fail(task.request_id, error)

    def _advance(self, running: _Running) -> None:
        request_id, run = running.task.request_id, running.run
        try:
            if not run.advance():
                self._events.append(StageProgress(request_id, run.step, run.num_steps))
                return
            tensors = {self.spec.output: _to_tensor(run.result(), self.spec.output)}
        except Exception as error:
            self._fail(request_id, error)
            return
        self._running = None
        payload = StagePayload(request_id, self.spec.stage.name, tensors, self._meta)
        self._events.append(StageDone(payload, {"steps": run.step}))

    def _fail(self, request_id: str, error: Exception) -> None:
        self.abort(request_id)
        wrapped = error if isinstance(error, OmniError) else stage_error(self.spec.stage.name, error)
        self._events.append(StageFailed(request_id, wrapped))


def _to_tensor(result: Any, output: str) -> Tensor:
    """What a pipeline returned -> image [N, H, W, 3] uint8, or audio [N, channels, n] float32."""
    made = getattr(result, f"{output}s", None)
    if made is None:
        raise StageError(f"the pipeline gave a {type(result).__name__} without {output}s; is `output` right?")
    if output == "image":
        pixels = [np.array(picture.convert("RGB")) for picture in made]
        return torch.from_numpy(np.stack(pixels))
    sounds = torch.stack([torch.as_tensor(sound).detach().float() for sound in made])
    sounds = sounds[:, None] if sounds.dim() == 2 else sounds
    if sounds.dim() != 3:
        raise StageError(f"the pipeline gave sounds of shape {list(sounds.shape)}, expected [N, channels, n]")
    if not bool(torch.isfinite(sounds).all()):
        raise StageError("the samples are not finite; use dtype bfloat16 or float32, or a smaller guidance_scale")
    return sounds
