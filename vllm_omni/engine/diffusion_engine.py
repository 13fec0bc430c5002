"""The diffusion stage: tasks become states, each step denoises all running ones and decodes one piece of a finished
one.
"""

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
from vllm_omni.engine.diffusion_checks import check_counts, diffusion_params
from vllm_omni.engine.dit_options import DiTOptions
from vllm_omni.errors import ConfigError, InvalidRequestError, OmniError, StageError
from vllm_omni.models.diffusion import DiffusionModel
from vllm_omni.params import MAX_SEED, DiffusionParams, StageParams
from vllm_omni.payload import StagePayload, StageSignature
from vllm_omni.registry import resolve
from vllm_omni.request import OmniRequest
from vllm_omni.utils.device import resolve_device, resolve_dtype
from vllm_omni.utils.files import read_json, resolve_model_folder
from vllm_omni.worker.diffusion_runner import DiffusionRunner, DiffusionState


@dataclass(slots=True)
class _Job:
    """A task and its states, one per output. outputs: by index, as they get decoded."""

    task: StageTask
    states: list[DiffusionState]
    is_decoded: bool
    outputs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        done = len(self.outputs) if self.is_decoded else sum(state.is_done for state in self.states)
        return done == len(self.states)


class DiffusionEngine(StageEngine):
    """Stage kind `dit`. Output i of a request draws its noise from seed + i on the CPU."""

    options_type = DiTOptions
    params_type = DiffusionParams

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        folder = _folder(stage)
        return _model_class(folder).signature(folder)

    @classmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        folder, options = _folder(stage), _options(stage)
        model_class, dtype = _model_class(folder), resolve_dtype(stage.dtype, resolve_device(stage.device))
        cached = config.dit_cache.max_memory_mb * MEGABYTE if options.cache.policy != "none" else 0
        return MemoryPlan(
            weights_bytes=model_class.weights_bytes(folder, dtype),
            activation_bytes=options.max_batch_tokens * model_class.token_bytes(folder, dtype),
            step_cache_bytes=int(cached),
        )

    @classmethod
    def needed_inputs(cls, stage: StageConfig, request: OmniRequest, params: StageParams) -> frozenset[str]:
        folder = _folder(stage)
        return _model_class(folder).needed_inputs(folder, frozenset(stage.inputs), request, diffusion_params(params))

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
        self._decoding: deque[DiffusionState] = deque()
        self._events: deque[StageEvent] = deque()

    def check(self, request: OmniRequest, params: StageParams) -> None:
        params = diffusion_params(params)
        self.model.check(request, params, frozenset(self.stage.inputs), self._limits)
        check_counts(params, self.model.num_steps(params), self._limits)
        if params.output_type == "latent" and "latents" not in self._wanted:
            raise InvalidRequestError(
                "output_type: got 'latent', but nobody reads the latents;"
                f" list '{self.stage.name}.latents' in the config's outputs"
            )

    def submit(self, task: StageTask) -> None:
        try:
            is_latent = diffusion_params(task.params).output_type == "latent"
            is_decoded = self.model.output_port in self._wanted and not is_latent
            job = _Job(task, self._begin(task), is_decoded)
            self._jobs[task.request_id] = job
            for state in job.states:
                self._scheduler.add(state.key, state.trajectory.num_tokens, state)
        except Exception as error:
            self._fail(task.request_id, error)

    def step(self) -> list[StageEvent]:
        states = self._scheduler.schedule()
        if states:
            for state, outputs in self._predict(states):
                self._advance(state, outputs)
        if self._decoding:
            self._decode(self._decoding[0])
        events, self._events = list(self._events), deque()
        return events

    def abort(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        for state in job.states if job else ():
            self._scheduler.remove(state.key)
        self._decoding = deque(state for state in self._decoding if state.request_id != request_id)
        self.runner.release(request_id)

    def has_work(self) -> bool:
        return bool(self._jobs or self._events)

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        return self.model.job_size(request, diffusion_params(params))

    def get_stats(self) -> dict[str, Any]:
        return {"running": len(self._jobs), **{f"step_cache_{k}": v for k, v in self._caches.get_stats().items()}}

    def check_integrity(self) -> None:
        self._caches.check_integrity()
        self._scheduler.check_integrity()
        held = sum(not state.is_done for job in self._jobs.values() for state in job.states)
        if held != len(self._scheduler):
            raise StageError(f"{held} states are unfinished, {len(self._scheduler)} are scheduled")
        if any(state.request_id not in self._jobs or not state.is_done for state in self._decoding):
            raise StageError("a state is decoded that is unfinished, or whose request is gone")

    @torch.inference_mode()
    def _begin(self, task: StageTask) -> list[DiffusionState]:
        params = diffusion_params(task.params)
        seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        prepared = self.model.prepare(task.inputs, params, seed)
        states = []
        for index in range(params.num_outputs or 1):
            trajectory = self.model.trajectory(prepared, params)
            noise = _noise(trajectory.latent_shape, (seed + index) % (MAX_SEED + 1)).to(self._device)
            states.append(DiffusionState(task.request_id, index, params, trajectory, noise))
        return states

    def _predict(self, states: list[DiffusionState]) -> list[tuple[DiffusionState, list[Tensor]]]:
        """Model outputs; when the batch fails, state by state, so that only the guilty ones fail."""
        try:
            return list(zip(states, self.runner.predict(states), strict=True))
        except Exception as error:
            if len(states) == 1:
                self._fail(states[0].request_id, error)
                return []
        return [pair for state in states if state.request_id in self._jobs for pair in self._predict([state])]

    def _advance(self, state: DiffusionState, outputs: list[Tensor]) -> None:
        job = self._jobs.get(state.request_id)
        if job is None:
            return
        try:
            self.runner.advance(state, outputs)
        except Exception as error:
            self._fail(state.request_id, error)
            return
        self._report(state)
        if state.is_done:
            self._scheduler.remove(state.key)
            if job.is_decoded:
                self._decoding.append(state)
        if job.is_done:
            self._finish(job)

    def _decode(self, state: DiffusionState) -> None:
        """One piece, so that other requests go on and an abort is prompt."""
        job = self._jobs[state.request_id]
        try:
            output = self.runner.decode(state)
        except Exception as error:
            self._fail(state.request_id, error)
            return
        if output is None:
            self._report(state)
            return
        self._decoding.popleft()
        job.outputs[state.index] = output
        state.pieces, state.decoder = [], None
        if job.is_done:
            self._finish(job)

    def _report(self, state: DiffusionState) -> None:
        self._events.append(StageProgress(state.request_id, state.step, state.num_steps))

    def _finish(self, job: _Job) -> None:
        request_id = job.task.request_id
        tensors = {}
        if job.is_decoded:
            tensors[self.model.output_port] = torch.stack([job.outputs[index] for index in range(len(job.states))])
        if "latents" in self._wanted:
            tensors["latents"] = torch.stack([state.latents for state in job.states])
        metrics = {
            "steps": sum(state.step for state in job.states),
            "cache_hits": sum(state.num_reused for state in job.states),
        }
        self.abort(request_id)
        payload = StagePayload(request_id, self.stage.name, tensors, self.model.meta())
        self._events.append(StageDone(payload, metrics))

    def _fail(self, request_id: str, error: Exception) -> None:
        self.abort(request_id)
        wrapped = error if isinstance(error, OmniError) else stage_error(self.stage.name, error)
        self._events.append(StageFailed(request_id, wrapped))


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


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32, drawn on the CPU, so that a seed means the same output on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
