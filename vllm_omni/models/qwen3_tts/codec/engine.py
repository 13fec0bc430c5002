"""The codec stage: every step decodes what has come of each request's codes, in one batch for all that have as many new
frames, and sends the audio on. Frames of a reference are decoded before them, and not heard.

A request holds a slot of the state pool from its first frame to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_omni.engine.base import Activity, EngineContext, StageEngine
from vllm_omni.engine.boundary import as_stage_error, clear_frames, made_so_far
from vllm_omni.errors import StageError
from vllm_omni.layers.kernel_choice import kernels_of
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
from vllm_omni.models.qwen3_tts.codec.decoder import CodecDecoder
from vllm_omni.models.qwen3_tts.codec.frame_queue import FrameQueue
from vllm_omni.models.qwen3_tts.codec.job import CodecJob
from vllm_omni.models.qwen3_tts.codec.spec import PORT, REFERENCE, SpeechCodecSpec
from vllm_omni.models.qwen3_tts.codec.state import StatePool
from vllm_omni.models.qwen3_tts.codec.warm_states import WarmStates
from vllm_omni.payload import StagePayload, StreamChunk
from vllm_omni.utils.device import is_out_of_memory, release_memory

AUDIO = "audio"


class CodecEngine(StageEngine):
    """Made by `SpeechCodecSpec.load`."""

    def __init__(self, spec: SpeechCodecSpec, context: EngineContext) -> None:
        self.spec, self._reads, self._device = spec, context.reads, context.device
        codec, variant = spec.codec, spec.stage.variant
        self.decoder: CodecDecoder = context.models.get(
            (*spec.weights_key(), context.device, spec.precision.name),
            lambda: CodecDecoder.load(codec.decoder, spec.folder, codec.prefix, context.device, context.dtype, variant),
        )
        self._kernels = kernels_of([self.decoder])
        self._pool = StatePool(self.decoder.carrying, spec.options.max_batch_size, context.device, context.dtype)
        self._warm = WarmStates()
        self._jobs: dict[str, CodecJob] = {}
        self._events: deque[StageEvent] = deque()
        self._meta = {"sample_rate": codec.sample_rate}

    def submit(self, task: StageTask) -> None:
        request_id, has_reference = task.request_id, REFERENCE in task.inputs
        self._jobs[request_id] = CodecJob(
            request_id, self._queue(PORT), self._queue(REFERENCE) if has_reference else None
        )
        if has_reference:
            self._accept(request_id, REFERENCE, task.inputs[REFERENCE])
        if request_id in self._jobs:
            self._accept(request_id, PORT, task.inputs.get(PORT))

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """Chunks for a task that is no longer here are dropped: it may have failed while they were on their way."""
        if port not in (PORT, REFERENCE):
            super().feed(request_id, port, chunk)
        if request_id in self._jobs:
            self._accept(request_id, port, chunk)

    def pause(self, request_id: str) -> None:
        if request_id in self._jobs:
            self._jobs[request_id].is_paused = True

    def resume(self, request_id: str) -> None:
        if request_id in self._jobs:
            self._jobs[request_id].is_paused = False

    def step(self) -> list[StageEvent]:
        for jobs, num_frames in list(self._batches()):
            self._run(jobs, num_frames)
        events, self._events = list(self._events), deque()
        return events

    def abort(self, request_id: str) -> None:
        self._events = deque(event for event in self._events if event.request_id != request_id)
        self._drop(request_id)

    def partial_result(self, request_id: str) -> StagePayload | None:
        job = self._jobs.get(request_id)
        return self._payload(job) if job is not None and job.audio else None

    def activity(self) -> Activity:
        can_step = any(job.is_ready and self._can_run(job) for job in self._jobs.values())
        return Activity.BUSY if can_step or self._events else Activity.IDLE

    def get_stats(self) -> Mapping[str, Any]:
        return {
            "running": len(self._jobs),
            "free_states": self._pool.num_free,
            "state_bytes": self._pool.num_bytes,
            "kernels": self._kernels,
        }

    def check_integrity(self) -> None:
        slots = [job.slot for job in self._jobs.values() if job.slot is not None]
        if len(set(slots)) != len(slots) or len(slots) + self._pool.num_free != self.spec.options.max_batch_size:
            raise StageError(f"slots {slots} are held, {self._pool.num_free} are free of {self.spec.options}")
        if any(job.is_done for job in self._jobs.values()):
            raise StageError("a job is done and still here")

    def _can_run(self, job: CodecJob) -> bool:
        """An end without a frame needs no state."""
        return job.slot is not None or bool(self._pool.num_free) or not len(job.queue)

    def _batches(self) -> Iterator[tuple[list[CodecJob], int]]:
        """(requests, new frames of each): in the order in which they came, those of one length together."""
        most, groups = self.spec.options.max_batch_frames, dict[tuple[int, bool], list[CodecJob]]()
        for job in [job for job in self._jobs.values() if job.is_ready]:
            if not self._can_run(job):
                continue
            if len(job.queue) and job.slot is None:
                self._begin(job)
            num_frames = min(len(job.queue), most)
            is_beginning = self.decoder.config.trims_start and not job.num_decoded
            groups.setdefault((num_frames, is_beginning), []).append(job)
        for (num_frames, _), jobs in groups.items():
            size = max(1, most // max(1, num_frames))
            for start in range(0, len(jobs), size):
                yield jobs[start : start + size], num_frames

    def _begin(self, job: CodecJob) -> None:
        """Gives it a slot, with the state behind its reference where that is kept."""
        job.slot = self._pool.take()
        if job.queue is job.frames:
            return
        num_frames = len(job.queue)
        job.reference_key = WarmStates.key(job.queue.next(num_frames))
        kept = self._warm.find(job.reference_key)
        if kept is not None:
            self._pool.write([job.slot], kept)
            self._consume(job, num_frames)

    def _run(self, jobs: list[CodecJob], num_frames: int) -> None:
        """One batch; when it fails, request by request, so that only the guilty ones fail."""
        try:
            sounds = self._decode(jobs, num_frames)
        except Exception as error:
            if is_out_of_memory(error):
                clear_frames(error)
                release_memory()
            if len(jobs) == 1:
                self._fail(jobs[0].request_id, error)
                return
            for job in jobs:
                self._run([job], num_frames)
            return
        for job, audio in zip(jobs, sounds, strict=True):
            self._hand_on(job, audio, num_frames)

    @torch.inference_mode()
    def _decode(self, jobs: list[CodecJob], num_frames: int) -> list[Tensor]:
        """[samples] float32 of each. The pool is written last: a batch that fails has changed nothing."""
        slots = [job.slot for job in jobs if job.slot is not None]
        if not num_frames:
            return [torch.zeros(0, device=self._device) for _ in jobs]
        codes = torch.stack([job.queue.next(num_frames).to(self._device) for job in jobs])
        state = self._pool.read(slots)
        audio = self.decoder(codes, state, is_first=not jobs[0].num_decoded).float()
        self._pool.write(slots, state)
        return list(audio)

    def _hand_on(self, job: CodecJob, audio: Tensor, num_frames: int) -> None:
        if not bool(torch.isfinite(audio).all()):
            self._fail(job.request_id, StageError("the audio is not finite; the decoder's weights are damaged"))
            return
        request_id, is_heard = job.request_id, job.queue is job.frames
        self._consume(job, num_frames)
        job.num_steps += 1
        if not is_heard:
            if job.queue is job.frames and job.slot is not None:
                self._warm.keep(job.reference_key, self._pool.read([job.slot]))
            self._events.append(StageWorked(request_id))
            return
        if AUDIO in self._reads.whole:
            job.audio.append(audio)
        if AUDIO in self._reads.streamed and len(audio):
            self._events.append(StageRows(request_id, AUDIO, audio[:, None], job.is_done, self._meta))
        self._events.append(StageProgress(request_id, job.num_heard, job.num_heard + len(job.frames)))
        if job.is_done:
            payload = self._payload(job)
            self._drop(request_id)
            self._events.append(StageDone(payload, job.counts()))

    def _consume(self, job: CodecJob, num_frames: int) -> None:
        """Lets go of the next frames of a job, and tells of the chunks that are used up by that."""
        port = job.queue.port
        self._events.extend([ChunkConsumed(job.request_id, port)] * job.consume(num_frames))

    def _payload(self, job: CodecJob) -> StagePayload:
        whole = torch.cat([torch.zeros(0, device=self._device), *job.audio])[None, None]
        tensors = {AUDIO: whole} if AUDIO in self._reads.whole else {}
        return StagePayload(job.request_id, self.spec.stage.name, tensors, self._meta)

    def _queue(self, port: str) -> FrameQueue:
        config = self.spec.codec.decoder
        return FrameQueue(port, config.codebook_size, config.num_quantizers)

    def _accept(self, request_id: str, port: str, chunk: object) -> None:
        job = self._jobs[request_id]
        queue = job.reference if port == REFERENCE else job.frames
        try:
            if queue is None:
                raise StageError(f"{port}: got a chunk, expected none for a task that began without it")
            queue.accept(chunk)
        except Exception as error:
            self._fail(request_id, error)
            return
        if queue is job.reference and queue.is_complete and not len(queue):
            self._consume(job, 0)  # there is none: nothing to wait for

    def _drop(self, request_id: str) -> None:
        """Frees all that a task holds; unknown ones are fine."""
        job = self._jobs.pop(request_id, None)
        if job is not None and job.slot is not None:
            self._pool.free(job.slot)

    def _fail(self, request_id: str, error: Exception) -> None:
        made = made_so_far(self, request_id)
        self._drop(request_id)
        self._events.append(StageFailed(request_id, as_stage_error(self.spec.stage.name, error), made))
