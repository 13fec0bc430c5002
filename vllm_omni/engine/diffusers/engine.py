"""The adapter stage: any pipeline of diffusers, hosted as it is. Each step runs one denoising step of one request.

Requests run one after another, since a pipeline is made for one call at a time; a model that has a DiffusionModel of
its own (kind `dit`) runs them together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import (
    EngineContext,
    MemoryPlan,
    StageDone,
    StageEngine,
    StageEvent,
    StageFailed,
    StageProgress,
    StageTask,
)
from vllm_omni.engine.boundary import stage_error
from vllm_omni.engine.diffusers.call import PipelineCall
from vllm_omni.engine.diffusers.options import DiffusersOptions
from vllm_omni.engine.diffusers.pipeline_folder import hosted_bytes, load_pipeline, pipeline_name, sample_rate
from vllm_omni.engine.diffusers.pipeline_host import PipelineHost, PipelineRun
from vllm_omni.engine.diffusion.checks import diffusion_params
from vllm_omni.errors import ConfigError, InvalidRequestError, OmniError, StageError
from vllm_omni.params import DiffusionParams, StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.device import resolve_device, resolve_dtype
from vllm_omni.utils.files import resolve_model_folder

PORTS = {"image": TensorSpec(("N", "H", "W", 3)), "audio": TensorSpec(("N", "channels", "n"))}


@dataclass(frozen=True, slots=True)
class _Running:
    """The request whose call is under way."""

    task: StageTask
    run: PipelineRun


class DiffusersEngine(StageEngine):
    """Stage kind `diffusers`. Reads the request's prompt, or the text that an edge brings to `prompt`."""

    options_type = DiffusersOptions
    params_type = DiffusionParams

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        options = _options(stage)
        pipeline_name(_folder(stage), options.pipeline)
        return StageSignature(
            inputs={"prompt": TextSpec()},
            outputs={options.output: PORTS[options.output]},
            required_inputs=frozenset(stage.inputs) & {"prompt"},  # a prompt that has an edge comes from nowhere else
            results=frozenset({options.output}),
        )

    @classmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        dtype = resolve_dtype(stage.dtype, resolve_device(stage.device))
        return MemoryPlan(weights_bytes=hosted_bytes(_folder(stage), dtype))

    @classmethod
    def note(cls, stage: StageConfig) -> str:
        return "requests run one after another; its memory plan counts weights alone"

    def __init__(self, stage: StageConfig, context: EngineContext) -> None:
        folder, options = _folder(stage), _options(stage)
        name = pipeline_name(folder, options.pipeline)
        pipeline = context.models.get(
            (name, folder.resolve(), context.device, context.dtype),
            lambda: load_pipeline(folder, name, context.device, context.dtype),
        )
        self.stage = stage
        self.host = PipelineHost(pipeline)
        self._output = options.output
        self._meta = {"sample_rate": sample_rate(pipeline)} if options.output == "audio" else {}
        self._call = PipelineCall(type(pipeline), options.output, context.config.limits)
        self._queue: deque[StageTask] = deque()
        self._running: _Running | None = None
        self._events: deque[StageEvent] = deque()

    def check(self, request: OmniRequest, params: StageParams) -> None:
        self._call.check(request, diffusion_params(params), reads_prompt="prompt" not in self.stage.inputs)

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

    def has_work(self) -> bool:
        return self._running is not None or bool(self._queue or self._events)

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        return self._call.job_size(diffusion_params(params))

    def get_stats(self) -> dict[str, Any]:
        return {"running": int(self._running is not None), "queued": len(self._queue)}

    def _begin(self, task: StageTask) -> None:
        try:
            params, prompt = diffusion_params(task.params), task.inputs.get("prompt", task.request.prompt)
            if not isinstance(prompt, str):
                raise InvalidRequestError(f"prompt: got {type(prompt).__name__}, expected a string")
            arguments = self._call.arguments(prompt, task.request, params)
            self._running = _Running(task, self.host.begin(arguments, self._call.num_steps(params)))
        except Exception as error:
            self._fail(task.request_id, error)

    def _advance(self, running: _Running) -> None:
        request_id, run = running.task.request_id, running.run
        try:
            if not run.advance():
                self._events.append(StageProgress(request_id, run.step, run.num_steps))
                return
            tensors = {self._output: _to_tensor(run.result(), self._output)}
        except Exception as error:
            self._fail(request_id, error)
            return
        self._running = None
        payload = StagePayload(request_id, self.stage.name, tensors, self._meta)
        self._events.append(StageDone(payload, {"steps": run.step}))

    def _fail(self, request_id: str, error: Exception) -> None:
        self.abort(request_id)
        wrapped = error if isinstance(error, OmniError) else stage_error(self.stage.name, error)
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


def _folder(stage: StageConfig) -> Path:
    if stage.model is None:
        raise ConfigError(f"stages.{stage.name}.model: missing; expected a diffusers pipeline folder")
    return resolve_model_folder(stage.model)


def _options(stage: StageConfig) -> DiffusersOptions:
    if not isinstance(stage.options, DiffusersOptions):
        got = type(stage.options).__name__
        raise ConfigError(f"stages.{stage.name}: got options of type {got}, expected DiffusersOptions")
    return stage.options
