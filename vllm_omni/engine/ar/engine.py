"""The AR stage kind: schedule, run, postprocess. Joins work, scheduler, runner and sampler; each of them does its own
part.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.core.ar.block_manager import BlockManager
from vllm_omni.core.ar.scheduler import ARScheduler, Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARJob, ARWork
from vllm_omni.engine.ar.options import AROptions
from vllm_omni.engine.ar.prompt import read_prompt
from vllm_omni.engine.ar.text_stage import TextWork
from vllm_omni.engine.base import (
    EngineContext,
    MemoryPlan,
    StageDone,
    StageEngine,
    StageEvent,
    StageFailed,
    StageTask,
)
from vllm_omni.engine.boundary import stage_error
from vllm_omni.errors import ConfigError, OmniError, StageError
from vllm_omni.layers.sampler import SampledToken, sample
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.layers.weights import weights_bytes
from vllm_omni.models.qwen2_5_omni.talker_stage import TalkerWork
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.payload import StagePayload, StageSignature, StreamChunk
from vllm_omni.request import OmniRequest
from vllm_omni.utils.device import resolve_device, resolve_dtype
from vllm_omni.utils.files import resolve_model_folder
from vllm_omni.worker.ar.language_model import load_language_model, model_key, read_model_config, tensor_prefix
from vllm_omni.worker.ar.model_runner import ModelRunner


class LLMEngine(StageEngine):
    """A language model over a paged KV pool: it writes text or computes the hidden states of a prompt (TextWork), or
    speaks (TalkerWork).
    """

    options_type = AROptions
    params_type = SamplingParams

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        folder = _model_folder(stage)
        return _work_of(stage).signature(stage, folder, read_model_config(folder, stage.options.part))

    @classmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        options: AROptions = stage.options
        folder = _model_folder(stage)
        model = read_model_config(folder, options.part)
        itemsize = resolve_dtype(stage.dtype, resolve_device(stage.device)).itemsize
        pool = options.plan_pool(model, itemsize)
        return MemoryPlan(
            weights_bytes=weights_bytes(folder, itemsize, tensor_prefix(options.part)),
            kv_pool_bytes=pool.num_blocks * pool.block_bytes,
            activation_bytes=options.activation_bytes(model, itemsize),
        )

    @classmethod
    def request_keys(cls, stage: StageConfig) -> frozenset[str]:
        return _work_of(stage).request_keys(stage.options)

    @classmethod
    def weights_key(cls, stage: StageConfig) -> tuple[str, ...]:
        options: AROptions = stage.options
        return (*super().weights_key(stage), options.part or "")

    @classmethod
    def reads_params(cls, stage: StageConfig) -> bool:
        options: AROptions = stage.options
        return options.can_write

    @classmethod
    def cache_key(cls, stage: StageConfig, task: StageTask) -> str | None:
        options: AROptions = stage.options
        if options.can_write or options.part is not None:
            return None
        prompt = read_prompt(options, task.request, task.inputs)
        content = prompt if isinstance(prompt, str) else [dict(x) if isinstance(x, Mapping) else int(x) for x in prompt]
        identity = [stage.name, str(_model_folder(stage).resolve()), stage.device, stage.dtype, repr(options), content]
        return sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()

    def __init__(self, stage: StageConfig, context: EngineContext) -> None:
        self.signature(stage)
        self._stage = stage
        options: AROptions = stage.options
        folder = _model_folder(stage)
        config = read_model_config(folder, options.part)
        self._pool = options.plan_pool(config, context.dtype.itemsize)
        self._work = _work_of(stage)(stage, context, folder, config, self._pool)
        blocks = BlockManager(self._pool.num_blocks, options.block_size, self._work.prefix_caching)
        self._scheduler = ARScheduler(blocks, options.max_num_seqs, options.max_num_batched_tokens)
        self._runner = self._load(folder, context)
        self._jobs: dict[str, ARJob] = {}
        self._events: list[StageEvent] = []
        self._sequence_ids = itertools.count()
        self._num_tokens = self._num_cached_tokens = 0

    def check(self, request: OmniRequest, params: StageParams) -> None:
        self._work.check(request, params)

    def submit(self, task: StageTask) -> None:
        if task.request_id in self._jobs:
            raise StageError(
                f"request {task.request_id!r}: submitted twice to stage {self._stage.name!r}; identifiers are unique"
            )
        try:
            job = self._jobs[task.request_id] = self._work.start(task, self._sequence_ids, self._runner)
            for sequence in job.sequences:
                self._scheduler.add(sequence)
        except Exception as error:
            self._events.append(self._fail(task.request_id, error))
            return
        for port, value in task.inputs.items():
            if isinstance(value, StreamChunk):
                self.feed(task.request_id, port, value)

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        job = self._jobs.get(request_id)
        if job is None:  # it ended while the chunk was on its way
            return
        num_queued = len(job.sequences)
        try:
            self._events += job.feed(port, chunk)
            for sequence in job.sequences[num_queued:]:
                self._scheduler.add(sequence)
        except Exception as error:
            del job.sequences[num_queued:]  # what could not be queued
            self._events.append(self._fail(request_id, error))

    def pause(self, request_id: str) -> None:
        if request_id in self._jobs:
            self._jobs[request_id].is_paused = True

    def resume(self, request_id: str) -> None:
        if request_id in self._jobs:
            self._jobs[request_id].is_paused = False

    def step(self) -> list[StageEvent]:
        events, self._events = self._events, []
        chunks, inputs = self._gather(self._scheduler.schedule(), events)
        if not chunks:
            return events
        logits = self._runner.run(chunks, inputs)
        for chunk in chunks:
            self._scheduler.advance(chunk)
        for request_id in {chunk.sequence.request_id for chunk in chunks}:
            self._jobs[request_id].num_steps += 1
        writing = [chunk.sequence for chunk in chunks if chunk.samples]
        rows = [self._jobs[sequence.request_id].row_of(sequence) for sequence in writing]
        tokens = dict(zip((sequence.sequence_id for sequence in writing), sample(logits, rows), strict=True))
        for chunk in chunks:
            events += self._postprocess(chunk.sequence, tokens.get(chunk.sequence.sequence_id))
        return events

    def abort(self, request_id: str) -> None:
        self._events = [event for event in self._events if event.request_id != request_id]
        self._forget(request_id)

    def has_work(self) -> bool:
        return bool(self._events) or self._scheduler.has_work()

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        return self._work.job_size(request, params)

    def get_stats(self) -> dict[str, Any]:
        blocks = self._scheduler.blocks
        return {
            "num_waiting": self._scheduler.num_waiting,
            "num_running": self._scheduler.num_running,
            "num_blocks": blocks.num_blocks,
            "num_free_blocks": blocks.num_free_blocks,
            "kv_pool_bytes": self._runner.num_bytes,
            "kv_pool_limited_by": self._pool.limited_by,
            "num_tokens": self._num_tokens,
            "num_cached_tokens": self._num_cached_tokens,
            "num_preemptions": self._scheduler.num_preemptions,
        }

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        living = sum(not s.is_finished for job in self._jobs.values() for s in job.sequences)
        if living != self._scheduler.num_waiting + self._scheduler.num_running:
            raise StageError(
                f"stage {self._stage.name!r}: {living} sequences in its jobs, another number in its scheduler"
            )

    def _gather(self, chunks: list[Chunk], events: list[StageEvent]) -> tuple[list[Chunk], dict[int, TokenInputs]]:
        """The inputs of all chunks by sequence id; a task whose inputs cannot be made fails, and its chunks go."""
        inputs: dict[int, TokenInputs] = {}
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.is_finished:  # it failed a moment ago, in another of its samples
                continue
            try:
                found = self._jobs[sequence.request_id].inputs_of(chunk)
            except Exception as error:
                events.append(self._fail(sequence.request_id, error))
                continue
            if found is not None:
                inputs[sequence.sequence_id] = found
        return [chunk for chunk in chunks if not chunk.sequence.is_finished], inputs

    def _postprocess(self, sequence: Sequence, token: SampledToken | StageError | None) -> list[StageEvent]:
        job = self._jobs.get(sequence.request_id)
        if job is None:  # it failed a moment ago, in another of its samples
            return []
        try:
            if isinstance(token, StageError):
                raise token
            events = job.take(sequence, token)
            if job.is_done:
                events.append(self._finish(job))
            elif job.is_over(sequence):
                self._scheduler.remove(sequence)
            return events
        except Exception as error:
            return [self._fail(sequence.request_id, error)]

    def _finish(self, job: ARJob) -> StageDone:
        payload = StagePayload(job.task.request_id, self._stage.name, job.tensors(), job.meta())
        metrics = job.metrics()
        self._num_tokens += metrics["tokens"]
        self._num_cached_tokens += metrics["cache_hits"]
        self._forget(job.task.request_id)
        return StageDone(payload, metrics)

    def _fail(self, request_id: str, error: Exception) -> StageFailed:
        self._forget(request_id)
        return StageFailed(request_id, error if isinstance(error, OmniError) else stage_error(self._stage.name, error))

    def _forget(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        for sequence in job.sequences if job else ():
            self._scheduler.remove(sequence)

    def _load(self, folder: Path, context: EngineContext) -> ModelRunner:
        options: AROptions = self._stage.options
        model = context.models.get(
            model_key(folder, context.device, context.dtype, options.part),
            lambda: load_language_model(folder, context.device, context.dtype, options.part),
        )
        return ModelRunner(
            model,
            num_blocks=self._pool.num_blocks,
            block_size=options.block_size,
            max_num_seqs=options.max_num_seqs,
            tapped_layers=sorted(self._work.tapped_layers),
            can_sample=self._work.can_write,
            device=context.device,
            dtype=context.dtype,
        )


def _work_of(stage: StageConfig) -> type[ARWork]:
    return TalkerWork if stage.options.part == "talker" else TextWork


def _model_folder(stage: StageConfig) -> Path:
    if stage.model is None:
        raise ConfigError(f"stages.{stage.name}.model: missing, expected the folder of a language model")
    return resolve_model_folder(stage.model)
