"""The diffusion stage: tasks become states, each step denoises all running ones, finished ones become pictures."""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.core.dit_cache_manager import MEGABYTE, DiTCacheManager
from vllm_omni.core.step_scheduler import StepScheduler
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
from vllm_omni.engine.dit_options import DiTOptions
from vllm_omni.errors import ConfigError, InvalidRequestError, OmniError, StageError
from vllm_omni.models.diffusion import DiffusionModel
from vllm_omni.params import MAX_SEED, DiffusionParams, StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec
from vllm_omni.registry import resolve
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import check_number
from vllm_omni.utils.device import resolve_device, resolve_dtype
from vllm_omni.utils.files import read_json, resolve_model_folder
from vllm_omni.worker.diffusion_runner import NEGATIVE, POSITIVE, DiffusionRunner, DiffusionState


@dataclass(slots=True)
class _Job:
    """A task and its states, one per output. pictures: [H, W, 3] uint8 by output, as they get done."""

    task: StageTask
    states: list[DiffusionState]
    pictures: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return all(state.is_done for state in self.states)


class DiffusionEngine(StageEngine):
    """Stage kind `dit`. Output i of a request draws its noise from seed + i on the CPU."""

    options_type = DiTOptions
    params_type = DiffusionParams

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        folder = _folder(stage)
        return StageSignature(
            inputs=_model_class(folder).ports(folder),
            outputs={"image": TensorSpec(("N", "H", "W", 3)), "latents": TensorSpec(("N", "C", "h", "w"))},
            required_inputs=frozenset({"prompt_embeds"}),
            results=frozenset({"image"}),
        )

    @classmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        folder, options = _folder(stage), _options(stage)
        dtype = resolve_dtype(stage.dtype, resolve_device(stage.device))
        width = read_json(folder / "transformer" / "config.json").get("dim", 0)
        cached = config.dit_cache.max_memory_mb * MEGABYTE if options.cache.policy != "none" else 0
        return MemoryPlan(
            weights_bytes=_model_class(folder).weights_bytes(folder, dtype),
            activation_bytes=options.max_batch_tokens * int(width) * dtype.itemsize * ACTIVATION_WIDTHS,
            step_cache_bytes=int(cached),
        )

    @classmethod
    def needed_inputs(cls, stage: StageConfig, params: StageParams) -> frozenset[str]:
        model_class = _model_class(_folder(stage))
        guided = model_class.guides(_guidance(params, model_class))
        return frozenset(port for port in stage.inputs if guided or port != "negative_prompt_embeds")

    def __init__(self, stage: StageConfig, context: EngineContext) -> None:
        folder, options = _folder(stage), _options(stage)
        model_class = _model_class(folder)
        self.stage = stage
        self._limits = context.config.limits
        self._wanted = context.wanted
        self._device = context.device
        self.model: DiffusionModel = context.models.get(
            (model_class.__name__, folder.resolve(), context.device, context.dtype),
            lambda: model_class.load(folder, context.device, context.dtype),
        )
        self._caches = DiTCacheManager(context.config.dit_cache)
        cache_type = resolve("step cache", options.cache.policy)
        self.runner = DiffusionRunner(self.model, cache_type, options.cache.threshold, self._caches)
        self._scheduler: StepScheduler[DiffusionState] = StepScheduler(options.max_batch_tokens, options.max_batch_size)
        self._jobs: dict[str, _Job] = {}
        self._events: deque[StageEvent] = deque()

    def check(self, request: OmniRequest, params: StageParams) -> None:
        params = _diffusion_params(params)
        self.model.check(params)
        self._check_limits(params)
        if params.sigmas is not None and params.num_inference_steps not in (None, len(params.sigmas)):
            raise InvalidRequestError(
                f"sigmas: got {len(params.sigmas)} of them and num_inference_steps {params.num_inference_steps};"
                " leave one of the two out"
            )
        if params.output_type == "latent" and "latents" not in self._wanted:
            raise InvalidRequestError(
                "output_type: got 'latent', but nobody reads the latents;"
                f" list '{self.stage.name}.latents' in the config's outputs"
            )
        self._check_guidance(request, params)

    def _check_limits(self, params: DiffusionParams) -> None:
        height, width = self.model.size(params)
        limits = self._limits
        for complaint in (
            check_number("height * width", height * width, 1, limits.max_pixels, integer=True),
            check_number("num_inference_steps", self._num_steps(params), 1, limits.max_inference_steps, integer=True),
            check_number("guidance_scale", _guidance(params, type(self.model)), 0, limits.max_guidance_scale),
            check_number("num_outputs", params.num_outputs or 1, 1, limits.max_outputs, integer=True),
        ):
            if complaint:
                raise InvalidRequestError(f"{complaint} (limits.* of the config can raise this)")

    def _check_guidance(self, request: OmniRequest, params: DiffusionParams) -> None:
        guidance = _guidance(params, type(self.model))
        if not self.model.guides(guidance) and (params.negative_prompt or request.negative_prompt):
            raise InvalidRequestError(
                f"negative_prompt: guidance_scale {guidance:g} never reads it; raise guidance_scale or leave it out"
            )
        if self.model.guides(guidance) and "negative_prompt_embeds" not in self.stage.inputs:
            raise InvalidRequestError(
                f"guidance_scale: got {guidance}, but stage {self.stage.name!r} has no input negative_prompt_embeds;"
                " add the edge or turn guidance off"
            )

    def submit(self, task: StageTask) -> None:
        try:
            job = _Job(task, self._begin(task))
            self._jobs[task.request_id] = job
            for state in job.states:
                self._scheduler.add(state.key, state.num_tokens, state)
        except Exception as error:
            self._fail(task.request_id, error)

    def step(self) -> list[StageEvent]:
        states = self._scheduler.schedule()
        if states:
            for state, output in self._predict(states):
                self._advance(state, output)
        events, self._events = list(self._events), deque()
        return events

    def abort(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        for state in job.states if job else ():
            self._scheduler.remove(state.key)
        self.runner.release(request_id)

    def has_work(self) -> bool:
        return bool(self._jobs or self._events)

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        params = _diffusion_params(params)
        height, width = self.model.size(params)
        branches = 2 if self.model.guides(_guidance(params, type(self.model))) else 1
        return float(height * width * self._num_steps(params) * branches * (params.num_outputs or 1)) * 1e-6

    def get_stats(self) -> dict[str, Any]:
        return {"running": len(self._jobs), **{f"step_cache_{k}": v for k, v in self._caches.get_stats().items()}}

    def check_integrity(self) -> None:
        self._caches.check_integrity()
        self._scheduler.check_integrity()
        held = sum(not state.is_done for job in self._jobs.values() for state in job.states)
        if held != len(self._scheduler):
            raise StageError(f"{held} states are unfinished, {len(self._scheduler)} are scheduled")

    def _num_steps(self, params: DiffusionParams) -> int:
        if params.sigmas is not None:
            return len(params.sigmas)
        return self.model.default_steps if params.num_inference_steps is None else params.num_inference_steps

    @torch.inference_mode()
    def _begin(self, task: StageTask) -> list[DiffusionState]:
        params = _diffusion_params(task.params)
        texts = {POSITIVE: self.model.encode_text(task.inputs["prompt_embeds"])}
        if "negative_prompt_embeds" in task.inputs:
            texts[NEGATIVE] = self.model.encode_text(task.inputs["negative_prompt_embeds"])
        height, width = self.model.size(params)
        shape = self.model.latent_shape(height, width)
        seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        return [
            DiffusionState(
                request_id=task.request_id,
                index=index,
                params=params,
                guidance_scale=_guidance(params, type(self.model)),
                num_tokens=sum(self.model.num_tokens(height, width, len(text)) for text in texts.values()),
                latents=_noise(shape, (seed + index) % (MAX_SEED + 1)).to(self._device),
                sampler=self.model.sampler(params, self._num_steps(params), shape),
                texts=texts,
            )
            for index in range(params.num_outputs or 1)
        ]

    def _predict(self, states: list[DiffusionState]) -> list[tuple[DiffusionState, Tensor]]:
        """Model outputs; when the batch fails, state by state, so that only the guilty ones fail."""
        try:
            return list(zip(states, self.runner.predict(states), strict=True))
        except Exception as error:
            if len(states) == 1:
                self._fail(states[0].request_id, error)
                return []
        return [pair for state in states if state.request_id in self._jobs for pair in self._predict([state])]

    def _advance(self, state: DiffusionState, output: Tensor) -> None:
        job = self._jobs.get(state.request_id)
        if job is None:
            return
        try:
            self.runner.advance(state, output)
            if state.is_done:
                self._scheduler.remove(state.key)
                if self._wants_picture(job):
                    job.pictures[state.index] = self.runner.decode(state)
        except Exception as error:
            self._fail(state.request_id, error)
            return
        self._events.append(StageProgress(state.request_id, state.step, state.num_steps))
        if job.is_done:
            self._finish(job)

    def _finish(self, job: _Job) -> None:
        request_id = job.task.request_id
        tensors = {}
        if self._wants_picture(job):
            tensors["image"] = torch.stack([job.pictures[index] for index in range(len(job.states))])
        if "latents" in self._wanted:
            tensors["latents"] = torch.stack([state.latents for state in job.states])
        metrics = {
            "steps": sum(state.step for state in job.states),
            "cache_hits": sum(state.num_reused for state in job.states),
        }
        self.abort(request_id)
        self._events.append(StageDone(StagePayload(request_id, self.stage.name, tensors), metrics))

    def _wants_picture(self, job: _Job) -> bool:
        return "image" in self._wanted and _diffusion_params(job.task.params).output_type != "latent"

    def _fail(self, request_id: str, error: Exception) -> None:
        self.abort(request_id)
        wrapped = error if isinstance(error, OmniError) else stage_error(self.stage.name, error)
        self._events.append(StageFailed(request_id, wrapped))


# Hidden states, their normed copy, q, k, v, both halves of the feed-forward's input (8/3 each) and its product.
ACTIVATION_WIDTHS = 14


def _folder(stage: StageConfig) -> Path:
    if stage.model is None:
        raise ConfigError(f"stages.{stage.name}.model: missing; expected a diffusers pipeline folder")
    return resolve_model_folder(stage.model)


def _options(stage: StageConfig) -> DiTOptions:
    options = stage.options if stage.options is not None else DiTOptions()
    if not isinstance(options, DiTOptions):
        raise ConfigError(f"stages.{stage.name}: got options of type {type(options).__name__}, expected DiTOptions")
    return options


def _model_class(folder: Path) -> type[DiffusionModel]:
    name = read_json(folder / "model_index.json").get("_class_name")
    model_class: type[DiffusionModel] = resolve("diffusion model", str(name))
    return model_class


def _diffusion_params(params: StageParams) -> DiffusionParams:
    if not isinstance(params, DiffusionParams):
        raise InvalidRequestError(f"params: got {type(params).__name__}, expected DiffusionParams")
    return params


def _guidance(params: StageParams, model_class: type[DiffusionModel]) -> float:
    scale = _diffusion_params(params).guidance_scale
    return model_class.default_guidance if scale is None else scale


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32, drawn on the CPU, so that a seed means the same picture on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
