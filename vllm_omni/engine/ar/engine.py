"""The running AR stage: schedule, run, postprocess. Joins stage, scheduler, runner and sampler; each of them does its
own part.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from vllm_omni.core.ar.block_manager import BlockManager
from vllm_omni.core.ar.prefill_pace import PrefillPace
from vllm_omni.core.ar.scheduler import ARScheduler, Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARJob, Written
from vllm_omni.engine.ar.loading import load_shared_model, make_runner
from vllm_omni.engine.base import Activity, EngineContext, StageEngine
from vllm_omni.engine.boundary import as_stage_error, made_so_far
from vllm_omni.engine.lora import AdapterDesk, loras_of
from vllm_omni.errors import StageError
from vllm_omni.layers.lora import AdapterMix
from vllm_omni.layers.sampler import SampledToken, Sampler, SamplingRow
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageTask, StageWorked
from vllm_omni.payload import StagePayload, StreamChunk
from vllm_omni.utils.device import is_out_of_memory, release_memory
from vllm_omni.worker.background import BackgroundJob

if TYPE_CHECKING:
    from vllm_omni.engine.ar.spec import ARSpec

NOTHING_SAMPLED: Many[None] = (None,)


@dataclass(frozen=True, slots=True)
class Preparing:
    """A task that waits for its media."""

    task: StageTask
    job: BackgroundJob[Any]


class AREngine(StageEngine):
    """A language model over a paged KV pool, with continuous batching."""

    def __init__(self, spec: ARSpec, context: EngineContext) -> None:
        self._spec = spec
        self._background = context.background
        options = spec.options
        blocks = BlockManager(
            spec.pool.num_blocks, options.block_size, spec.prefix_caching, spec.cache_window, options.least_kept_blocks
        )
        lookup = None if options.speculation is None else options.speculation.make_lookup()
        pace = None if options.max_decode_wait_s is None else PrefillPace(options.max_decode_wait_s)
        self._scheduler = ARScheduler(blocks, options.max_num_seqs, options.max_num_batched_tokens, lookup, pace)
        shared = load_shared_model(spec, context)
        self._group = shared.group
        self._runner = make_runner(spec, context, shared)
        module = cast(nn.Module, shared.model)
        self._desk = None if spec.lora is None else AdapterDesk(spec.lora, context, shared.key, module)
        self._kernels = {
            "attention": spec.attention,
            **self._runner.kernels,
            "steps": "captured" if spec.captures_steps else "launched",
        }
        self._sampler = Sampler()
        self._stage = spec.make_stage(context, self._runner)
        self._jobs: dict[str, ARJob] = {}
        self._preparing: dict[str, Preparing] = {}
        self._unadapted: dict[str, StageTask] = {}  # prepared tasks that wait for their adapters
        self._events: list[StageEvent] = []
        self._sequence_ids = itertools.count()
        self._num_tokens = self._num_cached_tokens = 0

    def submit(self, task: StageTask) -> None:
        if any(task.request_id in held for held in (self._jobs, self._preparing, self._unadapted)):
            raise StageError(
                f"request {task.request_id!r}: submitted twice to stage {self._spec.stage.name!r}; identifiers are "
                "unique"
            )
        preparation = self._stage.preparation(task)
        if preparation is None:
            self._queue(task)
        else:
            self._preparing[task.request_id] = Preparing(task, self._background.begin(preparation))

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        job = self._jobs.get(request_id)
        if job is None:  # it ended while the chunk was on its way
            return
        num_queued = len(job.sequences)
        try:
            self._events += job.feed(port, chunk)
            self._add(job, job.sequences[num_queued:])
            if job.is_done:  # the chunk was the last, and left nothing to compute
                self._events.append(self._finish(job))
        except Exception as error:
            del job.sequences[num_queued:]  # what could not be queued
            self._events.append(self._fail(request_id, error))

    def pause(self, request_id: str) -> None:
        self._set_paused(request_id, True)

    def resume(self, request_id: str) -> None:
        self._set_paused(request_id, False)

    def step(self) -> list[StageEvent]:
        self._start_prepared()
        self._admit()
        events, self._events = self._events, []
        chunks, inputs = self._gather(self._scheduler.schedule(), events)
        if not chunks:
            return events
        computed = {chunk.sequence.request_id for chunk in chunks}
        try:
            tokens = self._compute(chunks, inputs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            events += [self._fail(request_id, error) for request_id in sorted(computed)]
            release_memory()
            return events
        for request_id in computed:
            self._jobs[request_id].num_steps += 1
        for chunk in chunks:
            events += self._postprocess(chunk, tokens.get(chunk.sequence.sequence_id, NOTHING_SAMPLED))
        return events or [StageWorked(chunks[0].sequence.request_id)]

    def abort(self, request_id: str) -> None:
        self._events = [event for event in self._events if event.request_id != request_id]
        preparing = self._preparing.pop(request_id, None)
        if preparing is not None:
            preparing.job.cancel()
        self._unadapted.pop(request_id, None)
        self._free(request_id)

    def partial_result(self, request_id: str) -> StagePayload | None:
        job = self._jobs.get(request_id)
        words = {} if job is None else job.words()
        return StagePayload(request_id, self._spec.stage.name, meta=words) if words else None

    def activity(self) -> Activity:
        is_prepared = any(preparing.job.is_done for preparing in self._preparing.values())
        can_admit = self._desk is not None and self._desk.is_ready
        if self._events or is_prepared or can_admit or self._scheduler.has_work():
            return Activity.BUSY
        return Activity.PENDING if self._preparing or self._unadapted else Activity.IDLE

    def breakdown(self) -> Exception | None:
        return None if self._group is None else self._group.breakdown()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()

    def get_stats(self) -> dict[str, Any]:
        blocks = self._scheduler.blocks
        return {
            "num_preparing": len(self._preparing),
            "num_waiting": self._scheduler.num_waiting,
            "num_running": self._scheduler.num_running,
            "num_blocks": blocks.num_blocks,
            "num_free_blocks": blocks.num_free_blocks,
            "num_touched_blocks": blocks.num_touched_blocks,
            "kv_pool_bytes": self._runner.num_bytes,
            "kv_pool_limited_by": self._spec.pool.limited_by,
            "num_tokens": self._num_tokens,
            "num_cached_tokens": self._num_cached_tokens,
            "num_preemptions": self._scheduler.num_preemptions,
            "num_drafted_tokens": self._scheduler.num_drafted_tokens,
            "num_accepted_tokens": self._scheduler.num_accepted_tokens,
            **({} if self._desk is None else self._desk.get_stats()),
            **({} if self._group is None else {"num_ranks": 1 + len(self._group.pids)}),
            "kernels": self._kernels,
        }

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        living = sum(not s.is_finished for job in self._jobs.values() for s in job.sequences)
        if living != self._scheduler.num_waiting + self._scheduler.num_running:
            raise StageError(
                f"stage {self._spec.stage.name!r}: {living} sequences in its jobs, another number in its scheduler"
            )

    def _start_prepared(self) -> None:
        for request_id, preparing in list(self._preparing.items()):
            if not preparing.job.is_done:
                continue
            del self._preparing[request_id]
            try:
                task = dataclasses.replace(preparing.task, prepared=preparing.job.result())
            except Exception as error:
                self._events.append(self._fail(request_id, error))
                continue
            self._queue(task)

    def _queue(self, task: StageTask) -> None:
        """Starts a prepared task, or lets it wait for its adapters."""
        loras = loras_of(task.params)
        if self._desk is None or not loras:
            self._start(task)
            return
        self._unadapted[task.request_id] = task
        self._desk.queue(task.request_id, loras)

    def _admit(self) -> None:
        """Tasks that waited for their adapters and have them now start; others fail over them."""
        for request_id, error in () if self._desk is None else self._desk.admit():
            task = self._unadapted.pop(request_id)
            if error is None:
                self._start(task)
            else:
                self._events.append(self._fail(request_id, error))

    def _adapters(self, request_id: str) -> AdapterMix | None:
        return None if self._desk is None else self._desk.mix(request_id)

    def _start(self, task: StageTask) -> None:
        try:
            job = self._jobs[task.request_id] = self._stage.start(task, self._sequence_ids)
            self._add(job, job.sequences)
        except Exception as error:
            self._events.append(self._fail(task.request_id, error))
            return
        for port, value in task.inputs.items():
            if isinstance(value, StreamChunk):
                self.feed(task.request_id, port, value)

    def _add(self, job: ARJob, sequences: Many[Sequence]) -> None:
        """Queues sequences of a job, which know what the scheduler is to know of their task."""
        adapters = self._adapters(job.task.request_id)
        for sequence in sequences:
            sequence.adapter = None if adapters is None else adapters.key
            sequence.is_watched = job.task.is_watched
            self._scheduler.add(sequence)

    def _set_paused(self, request_id: str, is_paused: bool) -> None:
        """A job without sequences has given no rows yet that a reader could be behind with."""
        job = self._jobs.get(request_id)
        for sequence in job.sequences if job else ():
            sequence.is_paused = is_paused

    def _gather(self, chunks: list[Chunk], events: list[StageEvent]) -> tuple[list[Chunk], dict[int, TokenInputs]]:
        """The inputs of all chunks by sequence id; a task whose inputs cannot be made fails, and its chunks go."""
        inputs: dict[int, TokenInputs] = {}
        has_failed = False
        for chunk in chunks:
            sequence = chunk.sequence
            job = self._jobs.get(sequence.request_id)
            if job is None:  # it failed a moment ago, in another of its samples
                continue
            try:
                found = job.inputs_of(chunk)
            except Exception as error:
                events.append(self._fail(sequence.request_id, error))
                has_failed = True
                continue
            if found is not None:
                inputs[sequence.sequence_id] = found
        return [chunk for chunk in chunks if not chunk.sequence.is_finished] if has_failed else chunks, inputs

    def _compute(
        self, chunks: list[Chunk], inputs: dict[int, TokenInputs]
    ) -> dict[int, list[SampledToken | StageError]]:
        """The tokens that were sampled, by sequence id."""
        began_s = time.perf_counter()
        adapters = () if self._desk is None else [self._adapters(chunk.sequence.request_id) for chunk in chunks]
        step = self._runner.run(chunks, inputs, adapters)
        writing = [chunk for chunk in chunks if chunk.samples]
        rows = [self._jobs[chunk.sequence.request_id].row_of(chunk.sequence) for chunk in writing]
        choice = step.choose(self._sampler, rows, [chunk.draft for chunk in writing])
        self._go_ahead(chunks, rows)
        tokens = choice.sample()
        if self._stage.completes_tokens and step.states is not None:
            self._complete(writing, tokens, step.states)
        self._scheduler.learn(chunks, time.perf_counter() - began_s)
        for chunk in chunks:
            self._scheduler.advance(chunk)
        return dict(zip((chunk.sequence.sequence_id for chunk in writing), tokens, strict=True))

    def _complete(self, writing: list[Chunk], tokens: list[list[SampledToken | StageError]], states: Tensor) -> None:
        """Lets the stage compute what follows from the tokens of the step."""
        starts = [0, *itertools.accumulate(1 + len(chunk.draft) for chunk in writing)]
        written = [
            Written(self._jobs[chunk.sequence.request_id], token.token_id, start + place)
            for chunk, start, sampled in zip(writing, starts, tokens, strict=False)
            for place, token in enumerate(sampled)
            if not isinstance(token, StageError)
        ]
        self._stage.complete(written, states)

    def _go_ahead(self, chunks: list[Chunk], rows: list[SamplingRow]) -> None:
        """Begins the next step already, where it is known without the tokens of this one."""
        if not self._runner.can_run_ahead or len(rows) < len(chunks) or not all(row.is_plain for row in rows):
            return
        if any(chunk.num_tokens > 1 for chunk in chunks):
            return
        goes_on = self._scheduler.grow_ahead(chunks)
        if goes_on:
            self._runner.run_ahead(
                chunks, goes_on, lambda step: step.choose(self._sampler, rows, tokens_ahead=1).chosen
            )

    def _postprocess(self, chunk: Chunk, tokens: Many[SampledToken | StageError | None]) -> list[StageEvent]:
        """tokens: the sampled ones, or one that is None."""
        sequence = chunk.sequence
        events: list[StageEvent] = []
        job = self._jobs.get(sequence.request_id)
        if job is None:  # it failed a moment ago, in another of its samples
            return []
        try:
            for index, token in enumerate(tokens):
                if index:
                    self._scheduler.accept(sequence)
                if isinstance(token, StageError):
                    raise token
                events += job.record(sequence, token)
                if job.is_over(sequence):
                    if job.is_done:
                        return [*events, self._finish(job)]
                    self._scheduler.remove(sequence)
                    return events
            if chunk.draft:
                self._scheduler.settle(chunk)
            return events
        except Exception as error:
            return [*events, self._fail(sequence.request_id, error)]

    def _finish(self, job: ARJob) -> StageDone:
        payload = StagePayload(job.task.request_id, self._spec.stage.name, job.tensors(), job.meta())
        metrics = job.metrics()
        if self._spec.options.speculation is not None:
            metrics["drafted_tokens"] = sum(sequence.num_drafted_tokens for sequence in job.sequences)
            metrics["accepted_tokens"] = sum(sequence.num_accepted_tokens for sequence in job.sequences)
        self._num_tokens += metrics["tokens"]
        self._num_cached_tokens += metrics["cache_hits"]
        self._free(job.task.request_id)
        return StageDone(payload, metrics)

    def _fail(self, request_id: str, error: Exception) -> StageFailed:
        made = made_so_far(self, request_id)
        self._free(request_id)
        return StageFailed(request_id, as_stage_error(self._spec.stage.name, error), made)

    def _free(self, request_id: str) -> None:
        if self._desk is not None:
            self._desk.release(request_id)
        job = self._jobs.pop(request_id, None)
        for sequence in job.sequences if job else ():
            self._scheduler.remove(sequence)
