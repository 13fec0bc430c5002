"""The diffusion stage: tasks become states, each step denoises all running ones and decodes one piece of a finished
one. Where a model takes an input chunk by chunk, every chunk is a state of its own.
"""

from __future__ import annotations

import secrets
from collections import deque
from typing import Any

import torch
from torch import Tensor

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.core.diffusion.dit_cache_manager import MEGABYTE, DiTCacheManager
from vllm_omni.core.diffusion.step_scheduler import StepScheduler
from vllm_omni.engine.base import (
    EngineContext,
    MemoryPlan,
    StageDone,
    StageEngine,
    StageEvent,
    StageFailed,
    StageProgress,
    StageRows,
    StageTask,
    StageTook,
)
from vllm_omni.engine.boundary import stage_error
from vllm_omni.engine.diffusion.checks import check_counts, check_readers, diffusion_params
from vllm_omni.engine.diffusion.folder import folder_of, model_class_of, options_of
from vllm_omni.engine.diffusion.job import DiffusionJob
from vllm_omni.engine.diffusion.options import DiTOptions
from vllm_omni.errors import OmniError, StageError
from vllm_omni.params import MAX_SEED, DiffusionParams, StageParams
from vllm_omni.payload import StagePayload, StageSignature, StreamChunk
from vllm_omni.registry import resolve
from vllm_omni.request import OmniRequest
from vllm_omni.utils.device import resolve_device, resolve_dtype
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel
from vllm_omni.worker.diffusion.diffusion_runner import DiffusionRunner, DiffusionState


class DiffusionEngine(StageEngine):
    """Stage kind `dit`. Output i of a request draws its noise from seed + i on the CPU."""

    options_type = DiTOptions
    params_type = DiffusionParams

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        folder = folder_of(stage)
        return model_class_of(stage, folder).signature(folder)

    @classmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        folder, options = folder_of(stage), options_of(stage)
        model_class, dtype = model_class_of(stage, folder), resolve_dtype(stage.dtype, resolve_device(stage.device))
        cached = config.dit_cache.max_memory_mb * MEGABYTE if options.cache.policy != "none" else 0
        return MemoryPlan(
            weights_bytes=model_class.weights_bytes(folder, dtype),
            activation_bytes=options.max_batch_tokens * model_class.token_bytes(folder, dtype),
            step_cache_bytes=int(cached),
        )

    @classmethod
    def weights_key(cls, stage: StageConfig) -> tuple[str, ...]:
        return (*super().weights_key(stage), options_of(stage).part or "")

    @classmethod
    def needed_inputs(cls, stage: StageConfig, request: OmniRequest, params: StageParams) -> frozenset[str]:
        folder, connected = folder_of(stage), frozenset(stage.inputs)
        return model_class_of(stage, folder).needed_inputs(folder, connected, request, diffusion_params(params))

    @classmethod
    def request_keys(cls, stage: StageConfig) -> frozenset[str]:
        folder = folder_of(stage)
        return model_class_of(stage, folder).request_keys(folder)

    @classmethod
    def note(cls, stage: StageConfig) -> str:
        folder = folder_of(stage)
        return model_class_of(stage, folder).note(folder)

    def __init__(self, stage: StageConfig, context: EngineContext) -> None:
        folder, options = folder_of(stage), options_of(stage)
        model_class = model_class_of(stage, folder)
        self.stage = stage
        self._limits = context.config.limits
        self._wanted, self._streamed = context.wanted, context.streamed
        self._device = context.device
        self._request_keys = model_class.request_keys(folder)
        self.model: DiffusionModel = context.models.get(
            (model_class.__name__, folder.resolve(), context.device, context.dtype),
            lambda: model_class.load(folder, context.device, context.dtype),
        )
        self._caches = DiTCacheManager(context.config.dit_cache)
        cache_type = resolve("step cache", options.cache.policy)
        self.runner = DiffusionRunner(self.model, cache_type, options.cache.threshold, self._caches)
        self._scheduler: StepScheduler[DiffusionState] = StepScheduler(options.max_batch_tokens, options.max_batch_size)
        self._jobs: dict[str, DiffusionJob] = {}
        self._decoding: deque[DiffusionState] = deque()
        self._events: deque[StageEvent] = deque()

    def check(self, request: OmniRequest, params: StageParams) -> None:
        params = diffusion_params(params)
        self.model.check(request, params, frozenset(self.stage.inputs), self._limits)
        check_counts(params, self.model.num_steps(params), self._limits)
        check_readers(params, self.stage.name, self._wanted, self.model.output_port in self._streamed)

    def submit(self, task: StageTask) -> None:
        try:
            job = self._jobs[task.request_id] = self._prepared(task)
            if self.model.streamed_input is None:
                self._begin(job, job.prepared)
        except Exception as error:
            self._fail(task.request_id, error)
            return
        if self.model.streamed_input is not None:
            self._go_on(job, task.inputs.get(self.model.streamed_input))

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """Chunks for a task that is no longer here are dropped: it may have failed while they were on their way."""
        if port != self.model.streamed_input:
            super().feed(request_id, port, chunk)
        if request_id in self._jobs:
            self._go_on(self._jobs[request_id], chunk)

    def pause(self, request_id: str) -> None:
        """Chunks that have begun are finished; no further one begins."""
        if self.model.streamed_input is None:
            super().pause(request_id)
        if request_id in self._jobs:
            self._jobs[request_id].is_paused = True

    def resume(self, request_id: str) -> None:
        if self.model.streamed_input is None:
            super().resume(request_id)
        if request_id in self._jobs:
            self._jobs[request_id].is_paused = False
            self._go_on(self._jobs[request_id])

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
        self._events = deque(event for event in self._events if event.request_id != request_id)
        self._forget(request_id)

    def has_work(self) -> bool:
        return bool(len(self._scheduler) or self._decoding or self._events)

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        return self.model.job_size(request, diffusion_params(params))

    def get_stats(self) -> dict[str, Any]:
        return {"running": len(self._jobs), **{f"step_cache_{k}": v for k, v in self._caches.get_stats().items()}}

    def check_integrity(self) -> None:
        self._caches.check_integrity()
        self._scheduler.check_integrity()
        held = sum(not state.is_done for job in self._jobs.values() for state in job.running.values())
        if held != len(self._scheduler):
            raise StageError(f"{held} states are unfinished, {len(self._scheduler)} are scheduled")
        if any(state.request_id not in self._jobs or not state.is_done for state in self._decoding):
            raise StageError("a state is decoded that is unfinished, or whose request is gone")
        if any(job.is_done for job in self._jobs.values()):
            raise StageError("a job is done and still here")

    @torch.inference_mode()
    def _prepared(self, task: StageTask) -> DiffusionJob:
        params = diffusion_params(task.params)
        seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        inputs = {port: value for port, value in task.inputs.items() if port != self.model.streamed_input}
        fields = {key: task.request.fields.get(key) for key in self._request_keys}
        is_read = self.model.output_port in self._wanted | self._streamed
        return DiffusionJob(
            task=task,
            params=params,
            seed=seed,
            prepared=self.model.prepare({**inputs, **fields}, params, seed),
            is_decoded=is_read and params.output_type != "latent",
            is_complete=self.model.streamed_input is None,
        )

    def _go_on(self, job: DiffusionJob, *chunks: object) -> None:
        """Takes the chunks that have come and begins what waits."""
        try:
            for chunk in chunks:
                job.take(str(self.model.streamed_input), chunk)
            self._begin_waiting(job)
        except Exception as error:
            self._fail(job.request_id, error)

    @torch.inference_mode()
    def _begin_waiting(self, job: DiffusionJob) -> None:
        while job.waiting and not job.is_paused:
            chunk = job.waiting.popleft()
            if chunk.stop > chunk.start:
                self._begin(job, self.model.prepare_chunk(job.prepared, chunk))
            else:
                self._took(job)
        if job.is_done:
            self._finish(job)

    @torch.inference_mode()
    def _begin(self, job: DiffusionJob, prepared: Any) -> None:
        """A state per output; a chunk goes on with the noise of the one output there is."""
        for output in range(job.num_outputs):
            trajectory = self.model.trajectory(prepared, job.params)
            noise = trajectory.noise((job.seed + output) % (MAX_SEED + 1)).to(self._device)
            state = DiffusionState(job.request_id, job.num_parts, job.params, trajectory, noise)
            job.begin(state)
            self._scheduler.add(state.key, trajectory.num_tokens, state)

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
        self._report(job, state)
        if state.is_done:
            self._scheduler.remove(state.key)
            self.runner.release(state.request_id, state.index)
            if job.is_decoded:
                self._decoding.append(state)
            else:
                self._end_part(job, state, None)

    def _decode(self, state: DiffusionState) -> None:
        """One piece, so that other requests go on and an abort is prompt."""
        job = self._jobs[state.request_id]
        try:
            output = self.runner.decode(state)
        except Exception as error:
            self._fail(state.request_id, error)
            return
        if output is None:
            self._report(job, state)
            return
        self._decoding.popleft()
        self._end_part(job, state, output)

    def _end_part(self, job: DiffusionJob, state: DiffusionState, output: Tensor | None) -> None:
        """States end in the order in which they began, so chunks are handed on in theirs."""
        port = self.model.output_port
        job.end(state, output if port in self._wanted else None, "latents" in self._wanted)
        if output is not None and port in self._streamed:
            rows = output.transpose(0, 1).contiguous()
            self._events.append(StageRows(job.request_id, port, rows, job.is_done, self.model.meta()))
        if job.is_chunked or not job.running:
            self._took(job)
        if job.is_done:
            self._finish(job)

    def _took(self, job: DiffusionJob) -> None:
        if self.model.streamed_input is not None:
            self._events.append(StageTook(job.request_id, self.model.streamed_input))

    def _report(self, job: DiffusionJob, state: DiffusionState) -> None:
        self._events.append(StageProgress(state.request_id, *job.progress(state)))

    def _finish(self, job: DiffusionJob) -> None:
        tensors, port = {}, self.model.output_port
        if job.is_decoded and port in self._wanted:
            tensors[port] = job.joined(job.outputs, dim=1)
        if "latents" in self._wanted:
            tensors["latents"] = job.joined(job.latents, dim=0)
        self._forget(job.request_id)
        payload = StagePayload(job.request_id, self.stage.name, tensors, self.model.meta())
        self._events.append(StageDone(payload, {"steps": job.num_steps, "cache_hits": job.num_reused}))

    def _forget(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        for state in job.running.values() if job else ():
            self._scheduler.remove(state.key)
        self._decoding = deque(state for state in self._decoding if state.request_id != request_id)
        self.runner.release(request_id)

    def _fail(self, request_id: str, error: Exception) -> None:
        self._forget(request_id)
        wrapped = error if isinstance(error, OmniError) else stage_error(self.stage.name, error)
        self._events.append(StageFailed(request_id, wrapped))
