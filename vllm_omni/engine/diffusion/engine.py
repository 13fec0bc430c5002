"""The diffusion stage: tasks become states, each step denoises all running ones and decodes one piece of a finished
one. Where a model takes an input chunk by chunk, every chunk is a state of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.core.diffusion.step_scheduler import StepScheduler
from vllm_omni.engine.base import Activity, EngineContext, StageEngine
from vllm_omni.engine.boundary import as_stage_error, clear_frames, made_so_far
from vllm_omni.engine.diffusion.arrivals import Arrival, ArrivalQueue
from vllm_omni.engine.diffusion.checks import PARAM_KEYS, diffusion_params
from vllm_omni.engine.diffusion.job import DiffusionJob
from vllm_omni.engine.diffusion.saved_job import SavedJob, job_content
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.engine.lora import AdapterDesk, loras_of
from vllm_omni.engine.shared_model import SharedModel
from vllm_omni.errors import StageError
from vllm_omni.layers.kernel_choice import kernels_of
from vllm_omni.layers.lora import AdapterMix, adapted
from vllm_omni.messages import (
    ChunkConsumed,
    StageDone,
    StageEvent,
    StageFailed,
    StageProgress,
    StageRows,
    StageTask,
    StageWorked,
)
from vllm_omni.params import draw_seed, sample_seed
from vllm_omni.payload import StagePayload, StreamChunk
from vllm_omni.utils.device import is_out_of_memory, release_memory
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel
from vllm_omni.worker.diffusion.diffusion_runner import DiffusionRunner, DiffusionState
from vllm_omni.worker.diffusion.encoded_images import EncodedImages
from vllm_omni.worker.diffusion.saved_sample import restore_sample
from vllm_omni.worker.diffusion.shared_model import BlockStack, SharedModelSpec
from vllm_omni.worker.parallel.blocks import BlocksLead, shards_of
from vllm_omni.worker.parallel.links import Links


class DiffusionEngine(StageEngine):
    """Made by `DiffusionSpec.load`. Output i of a request draws its noise from seed + i on the CPU."""

    def __init__(self, spec: DiffusionSpec, context: EngineContext) -> None:
        self.spec = spec
        self._reads = context.reads
        self._device = context.device
        key = (type(spec.model).__name__, spec.folder.resolve(), context.device, spec.precision.name, spec.sharing_key)
        shared = SharedModel.load(spec, context, key, partial(_load_model, spec, context), spec.block_orders)
        self._group = shared.group
        self.model: DiffusionModel = shared.model
        self._kernels = kernels_of(part for part in vars(self.model).values() if isinstance(part, torch.nn.Module))
        self._desk = None if spec.lora is None else AdapterDesk(spec.lora, context, shared.key, self.model.adapted())
        self._caches = DiTCacheManager(context.dit_cache)
        self._encoded = EncodedImages(DiTCacheManager(max_bytes=spec.encoded_bytes), context.limits)
        lead = None if self._group is None else BlocksLead(self._group, cast(BlockStack, self.model))
        self.runner = DiffusionRunner(self.model, spec.policy, self._caches, spec.tiling(), lead)
        self._scheduler: StepScheduler[DiffusionState] = StepScheduler(
            spec.options.max_batch_tokens, spec.options.max_batch_size, self._caches
        )
        self._jobs: dict[str, DiffusionJob] = {}
        self._arrivals = ArrivalQueue()
        self._decoding: deque[DiffusionState] = deque()
        self._events: deque[StageEvent] = deque()
        self._prepared: set[str] = set()  # tasks whose conditions were encoded in this step

    def breakdown(self) -> Exception | None:
        return None if self._group is None else self._group.breakdown()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()

    def submit(self, task: StageTask) -> None:
        params, port = self.spec.with_fields(task.request, diffusion_params(task.params)), self.model.streamed_input
        fields = {key: task.request.fields.get(key) for key in self.spec.request_keys - PARAM_KEYS}
        saved = None
        if task.saved is not None:
            saved = SavedJob.read(task.saved, self.spec.signature, params.num_outputs or 1, self._device)
        given = task.inputs if saved is None else saved.inputs
        inputs = {**{name: value for name, value in given.items() if name != port}, **fields}
        job = self._jobs[task.request_id] = DiffusionJob(
            task=task,
            params=params,
            seed=draw_seed() if params.seed is None else params.seed,
            inputs=inputs,
            is_heavy=self.model.is_heavy(inputs, params),
            is_complete=port is None,
            saved=saved,
        )
        loras = loras_of(params)
        if self._desk is not None and loras:
            self._desk.queue(task.request_id, loras)
            job.lacks_adapters = True
        if saved is not None:
            saved.begin(job)
        self._arrivals.add(Arrival(job, None if port is None else task.inputs.get(port)))

    def save_state(self, request_id: str) -> Mapping[str, Any] | None:
        job = self._jobs.get(request_id)
        if job is None or not job.running:
            return None
        return job_content(job, self.spec.signature, self.runner)

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """Chunks for a task that is no longer here are dropped: it may have failed while they were on their way."""
        if port != self.model.streamed_input:
            super().feed(request_id, port, chunk)
        if request_id in self._jobs:
            self._arrivals.add(Arrival(self._jobs[request_id], chunk))

    def pause(self, request_id: str) -> None:
        """Chunks that have begun are finished; no further one begins."""
        if request_id in self._jobs:
            self._jobs[request_id].is_paused = True

    def resume(self, request_id: str) -> None:
        if request_id in self._jobs:
            self._jobs[request_id].is_paused = False

    def step(self) -> list[StageEvent]:
        self._admit()
        for arrival in self._arrivals.due():
            self._begin(arrival)
        states = self._scheduler.schedule()
        if states:
            for state, outputs in self._predict(states):
                self._advance(state, outputs)
        if self._decoding:
            self._decode(self._decoding[0])
        events, self._events = list(self._events), deque()
        silent = self._prepared.difference(event.request_id for event in events)
        self._prepared = set()
        return events + [StageWorked(request_id) for request_id in sorted(silent)]

    def abort(self, request_id: str) -> None:
        self._events = deque(event for event in self._events if event.request_id != request_id)
        self._drop(request_id)

    def partial_result(self, request_id: str) -> StagePayload | None:
        job = self._jobs.get(request_id)
        made = {} if job is None else job.finished_outputs(self.model.output_port)
        if job is None or not made:
            return None
        return StagePayload(request_id, self.spec.stage.name, made, self.model.meta(job.params))

    def activity(self) -> Activity:
        desk = self._desk
        is_busy = len(self._scheduler) or self._decoding or self._arrivals.is_ready or self._events
        if is_busy or (desk is not None and desk.is_ready):
            return Activity.BUSY
        return Activity.PENDING if desk is not None and desk.is_waiting else Activity.IDLE

    def get_stats(self) -> dict[str, Any]:
        caches = {f"step_cache_{name}": value for name, value in self._caches.get_stats().items()}
        adapters = {} if self._desk is None else self._desk.get_stats()
        return {"running": len(self._jobs), **caches, **adapters, "kernels": self._kernels}

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        held = sum(not state.is_done for job in self._jobs.values() for state in job.running.values())
        if held != len(self._scheduler):
            raise StageError(f"{held} states are unfinished, {len(self._scheduler)} are scheduled")
        if any(state.request_id not in self._jobs or not state.is_done for state in self._decoding):
            raise StageError("a state is decoded that is unfinished, or whose request is gone")
        if any(job.is_done for job in self._jobs.values()):
            raise StageError("a job is done and still here")

    def _admit(self) -> None:
        """Tasks that waited for their adapters and have them now may begin; others fail over them."""
        for request_id, error in () if self._desk is None else self._desk.admit():
            if error is None:
                self._jobs[request_id].lacks_adapters = False
                self._prepared.add(request_id)
            else:
                self._fail(request_id, error)

    def _adapters(self, request_id: str) -> AdapterMix | None:
        return None if self._desk is None else self._desk.mix(request_id)

    @torch.inference_mode()
    def _begin(self, arrival: Arrival) -> None:
        """Prepares a task before its first part begins. A chunk without new rows is consumed at once."""
        job, port = arrival.job, self.model.streamed_input
        try:
            if not job.is_prepared:
                with adapted([self._adapters(job.request_id)]):
                    job.prepared = self.model.prepare(job.inputs, job.params, job.seed, self._encoded)
                job.is_prepared = True
                self._prepared.add(job.request_id)
            if port is None:
                self._begin_parts(job, job.prepared)
                return
            chunk = job.accept(port, arrival.chunk)
            if chunk.stop > chunk.start:
                self._begin_parts(job, self.model.prepare_chunk(job.prepared, chunk))
            else:
                self._consume(job)
            if job.is_done:
                self._finish(job)
        except Exception as error:
            self._fail(job.request_id, error)

    def _begin_parts(self, job: DiffusionJob, prepared: Any) -> None:
        """A state per output; a chunk goes on with the noise of the one output there is. Of a task that was saved, a
        state per output that was on its way, as it was.
        """
        for output in range(job.num_outputs):
            if job.saved is not None and output not in job.saved.running:
                job.num_parts += 1
                continue
            trajectory = self.model.trajectory(prepared, job.params)
            generator = torch.Generator().manual_seed(sample_seed(job.seed, output))
            noise = trajectory.noise(generator).to(self._device)
            state = DiffusionState(job.request_id, job.num_parts, job.params, trajectory, noise, generator)
            state.adapters = self._adapters(job.request_id)
            state.tile = self.runner.tile_of(noise)
            if job.saved is not None:
                restore_sample(state, job.saved.running[output], self.runner.policy)
            if not state.is_done:
                self._scheduler.add(state.key, state, trajectory.num_tokens, self.runner.cache_bytes(trajectory))
            job.begin(state)
        if job.saved is not None:
            job.num_resumed = job.progress()[0]
            for state in [state for state in job.running.values() if state.is_done]:
                self._leave_denoising(job, state)

    def _predict(self, states: list[DiffusionState]) -> list[tuple[DiffusionState, list[Tensor]]]:
        """Model outputs; when the batch fails, state by state, so that only the guilty ones fail."""
        try:
            return list(zip(states, self.runner.predict(states), strict=True))
        except Exception as error:
            if is_out_of_memory(error):
                clear_frames(error)
                release_memory()
            if len(states) == 1:
                self._fail(states[0].request_id, error)
                return []
        return [pair for state in states if state.request_id in self._jobs for pair in self._predict([state])]

    def _advance(self, state: DiffusionState, outputs: list[Tensor]) -> None:
        job = self._jobs.get(state.request_id)
        if job is None:
            return
        try:
            preview = self.runner.advance(state, outputs)
        except Exception as error:
            self._fail(state.request_id, error)
            return
        self._report(job, None if preview is None else job.collect(state, preview))
        if state.is_done:
            self._scheduler.remove(state.key)
            self._leave_denoising(job, state)

    def _leave_denoising(self, job: DiffusionJob, state: DiffusionState) -> None:
        if self.model.output_port in self._reads and job.params.output_type != "latent":
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
            self._report(job)
            return
        self._decoding.popleft()
        self._end_part(job, state, output)

    def _end_part(self, job: DiffusionJob, state: DiffusionState, output: Tensor | None) -> None:
        """States end in the order in which they began, so chunks are handed on in theirs."""
        port, reads = self.model.output_port, self._reads
        job.end(state, output if port in reads.whole else None, "latents" in reads.whole)
        if output is not None and port in reads.streamed:
            rows = output.transpose(0, 1).contiguous()
            self._events.append(StageRows(job.request_id, port, rows, job.is_done, self.model.meta(job.params)))
        if job.is_chunked or not job.running:
            self._consume(job)
        if job.is_done:
            self._finish(job)

    def _consume(self, job: DiffusionJob) -> None:
        if self.model.streamed_input is not None:
            self._events.append(ChunkConsumed(job.request_id, self.model.streamed_input))

    def _report(self, job: DiffusionJob, previews: Tensor | None = None) -> None:
        self._events.append(StageProgress(job.request_id, *job.progress(), previews=previews))

    def _finish(self, job: DiffusionJob) -> None:
        tensors = job.tensors(self.model.output_port, self._reads, self.spec.signature)
        self._drop(job.request_id)
        payload = StagePayload(job.request_id, self.spec.stage.name, tensors, self.model.meta(job.params))
        self._events.append(StageDone(payload, job.counts()))

    def _drop(self, request_id: str) -> None:
        """Frees all that a task holds; unknown ones are fine."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            if self._desk is not None:
                self._desk.release(request_id)
            self._arrivals.drop(job)
            for state in job.running.values():
                self._scheduler.remove(state.key)
            self._decoding = deque(state for state in self._decoding if state.request_id != request_id)

    def _fail(self, request_id: str, error: Exception) -> None:
        made = made_so_far(self, request_id)
        self._drop(request_id)
        self._events.append(StageFailed(request_id, as_stage_error(self.spec.stage.name, error), made))


def _load_model(spec: DiffusionSpec, context: EngineContext, links: Links | None) -> DiffusionModel:
    """links: of the first rank, where others share the blocks."""
    arguments = (context.device, context.dtype, spec.precision.quantization, spec.make_copies())
    if links is None:
        return spec.model.load(*arguments)
    assert isinstance(spec.model, SharedModelSpec), "refused when the spec was made"
    return spec.model.load(*arguments, shards_of(links))
