"""The AR stage kind: schedule, run, postprocess. Joins tokenizer, scheduler, runner and sampler; each of them does its
own work.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.core.ar_scheduler import ARScheduler
from vllm_omni.core.block_manager import BlockManager
from vllm_omni.core.sequence import Sequence
from vllm_omni.engine.ar_input import ARInput, ARLimits, read_prompt
from vllm_omni.engine.ar_job import ARJob, Sample
from vllm_omni.engine.ar_options import AROptions
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
from vllm_omni.engine.text_processor import TextProcessor, TextStream, end_of_sequence_ids, find_tokenizer
from vllm_omni.errors import ConfigError, OmniError, StageError
from vllm_omni.layers.sampler import SampledToken, SamplingRow, sample
from vllm_omni.models.language_model import load_language_model, model_key, read_model_config
from vllm_omni.models.loader import weights_bytes
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.device import resolve_device, resolve_dtype
from vllm_omni.utils.files import resolve_model_folder
from vllm_omni.worker.model_runner import ModelRunner


class LLMEngine(StageEngine):
    """A language model over a paged KV pool. Task `generate` writes text, task `encode` computes the hidden states of a
    prompt.
    """

    options_type = AROptions
    params_type = SamplingParams

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        options: AROptions = stage.options
        config = read_model_config(_model_folder(stage))
        where = f"stages.{stage.name}"
        if options.can_write and not config.can_write:
            raise ConfigError(
                f"{where}.task: got 'generate', but the model has no head; use task: encode or a Qwen3ForCausalLM"
            )
        if options.prompt != "prompt" and "prompt" in stage.inputs:
            raise ConfigError(
                f"{where}.prompt: got {options.prompt!r}, but inputs.prompt brings the prompt; keep one of them"
            )
        if stage.defaults and not options.can_write:
            raise ConfigError(
                f"{where}.defaults: got {list(stage.defaults)}, but task encode samples nothing; remove it"
            )
        options.model_len(config)
        layers = options.tapped_layers(config)
        outputs = {port: TensorSpec(("T", len(tapped) * config.hidden_size)) for port, tapped in layers.items()}
        text = {"text": TextSpec()} if options.can_write else {}
        return StageSignature(
            inputs={"prompt": TextSpec()},
            outputs={**text, **{label: TextSpec() for label in options.sections}, **outputs},
            required_inputs=frozenset({"prompt"} & stage.inputs.keys()),  # the request's own is no stand-in for it
            results=frozenset(text),
            meta=options.meta_keys,
        )

    @classmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        options: AROptions = stage.options
        folder = _model_folder(stage)
        model = read_model_config(folder)
        itemsize = resolve_dtype(stage.dtype, resolve_device(stage.device)).itemsize
        pool = options.plan_pool(model, itemsize)
        return MemoryPlan(
            weights_bytes=weights_bytes(folder, itemsize),
            kv_pool_bytes=pool.num_blocks * pool.block_bytes,
            activation_bytes=options.activation_bytes(model, itemsize),
        )

    @classmethod
    def reads_params(cls, stage: StageConfig) -> bool:
        options: AROptions = stage.options
        return options.can_write

    @classmethod
    def cache_key(cls, stage: StageConfig, task: StageTask) -> str | None:
        options: AROptions = stage.options
        if options.can_write:
            return None
        prompt = read_prompt(options, task.request, task.inputs)
        content = prompt if isinstance(prompt, str) else [dict(x) if isinstance(x, Mapping) else int(x) for x in prompt]
        identity = [stage.name, str(_model_folder(stage).resolve()), stage.device, stage.dtype, repr(options), content]
        return sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()

    def __init__(self, stage: StageConfig, context: EngineContext) -> None:
        self.signature(stage)
        self._stage = stage
        self._options: AROptions = stage.options
        folder = _model_folder(stage)
        config = read_model_config(folder)
        self._pool = self._options.plan_pool(config, context.dtype.itemsize)
        self._taps = {p: layers for p, layers in self._options.tapped_layers(config).items() if p in context.wanted}
        self._can_fan_out = not self._taps and not _feeds_others(stage, context.config)
        self._processor = TextProcessor(
            find_tokenizer(folder, self._options.tokenizer),
            chat_template=self._options.chat_template,
            template_kwargs=self._options.chat_template_kwargs,
        )
        self._input = ARInput(
            self._options, self._processor, ARLimits.of(self._options, config, self._pool, context.config)
        )
        self._eos_ids = end_of_sequence_ids(folder, self._processor.tokenizer)
        blocks = BlockManager(self._pool.num_blocks, self._options.block_size, self._options.prefix_caching)
        self._scheduler = ARScheduler(blocks, self._options.max_num_seqs, self._options.max_num_batched_tokens)
        self._runner = self._load(folder, context)
        self._jobs: dict[str, ARJob] = {}
        self._events: list[StageEvent] = []
        self._sequence_ids = itertools.count()
        self._num_tokens = self._num_cached_tokens = 0

    def check(self, request: OmniRequest, params: StageParams) -> None:
        checked = self._input.check_params(params, self._can_fan_out)
        if "prompt" not in self._stage.inputs:
            self._input.prepare(read_prompt(self._options, request, {}), checked)

    def submit(self, task: StageTask) -> None:
        if task.request_id in self._jobs:
            raise StageError(
                f"request {task.request_id!r}: submitted twice to stage {self._stage.name!r}; identifiers are unique"
            )
        try:
            job = self._make_job(task)
            for sequence in job.sequences:
                self._scheduler.add(sequence)
            self._jobs[task.request_id] = job
        except Exception as error:
            self._events.append(StageFailed(task.request_id, self._omni_error(error)))

    def step(self) -> list[StageEvent]:
        events, self._events = self._events, []
        chunks = self._scheduler.schedule()
        if not chunks:
            return events
        logits = self._runner.run(chunks)
        for chunk in chunks:
            self._scheduler.advance(chunk)
        for request_id in {chunk.sequence.request_id for chunk in chunks}:
            self._jobs[request_id].num_steps += 1
        writing = [chunk.sequence for chunk in chunks if chunk.samples]
        rows = [self._jobs[sequence.request_id].samples[sequence.sequence_id].row for sequence in writing]
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
        """In forward passes of one token, a prompt token counting a tenth."""
        prompt = read_prompt(self._options, request, {})
        num_prompt_tokens = len(prompt) / 4 if isinstance(prompt, str) else len(prompt)
        num_new_tokens = 0
        if self._options.can_write and isinstance(params, SamplingParams):
            num_new_tokens = (params.max_tokens or 256) * (params.n or 1)
        return num_prompt_tokens / 10 + num_new_tokens

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

    def _postprocess(self, sequence: Sequence, token: SampledToken | StageError | None) -> list[StageEvent]:
        job = self._jobs.get(sequence.request_id)
        if job is None:  # it failed a moment ago, in another of its samples
            return []
        try:
            return self._take(job, sequence, token)
        except Exception as error:
            self._forget(sequence.request_id)
            return [StageFailed(sequence.request_id, self._omni_error(error))]

    def _take(self, job: ARJob, sequence: Sequence, token: SampledToken | StageError | None) -> list[StageEvent]:
        if isinstance(token, StageError):
            raise token
        events: list[StageEvent] = []
        written = job.samples.get(sequence.sequence_id)
        if token is not None and written is not None:
            text = written.write(token)
            if sequence is job.sequences[0]:
                events.append(StageProgress(sequence.request_id, written.num_written, written.max_new_tokens, text))
        if job.is_done:
            events.append(self._finish(job))
        elif written is not None and written.is_done:
            self._scheduler.remove(sequence)
        return events

    def _finish(self, job: ARJob) -> StageDone:
        tensors = {}
        for port, layers in self._taps.items():
            sequence = job.sequences[0]
            bounds = (0, sequence.num_prompt_tokens)
            if self._options.taps[port].tokens == "completion":
                bounds = (sequence.num_prompt_tokens, sequence.num_computed_tokens)
            tensors[port] = self._runner.tapped_states(sequence, layers, *bounds)
        payload = StagePayload(job.task.request_id, self._stage.name, tensors, job.meta(self._options.sections))
        metrics = job.metrics()
        self._num_tokens += metrics["tokens"]
        self._num_cached_tokens += metrics["cache_hits"]
        self._forget(job.task.request_id)
        return StageDone(payload, metrics)

    def _forget(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        for sequence in job.sequences if job else ():
            self._scheduler.remove(sequence)

    def _make_job(self, task: StageTask) -> ARJob:
        params = self._input.check_params(task.params, self._can_fan_out)
        prompt = self._input.prepare_task(task, self._stage, params)
        num_sequences = (params.n or 1) if self._options.can_write else 1
        sequences = [
            Sequence(
                next(self._sequence_ids),
                task.request_id,
                list(prompt.token_ids),
                max_tokens=len(prompt.token_ids) + prompt.max_new_tokens,
                is_writing=self._options.can_write,
            )
            for _ in range(num_sequences)
        ]
        job = ARJob(task, prompt, sequences)
        if self._options.can_write:
            for index, sequence in enumerate(sequences):
                job.samples[sequence.sequence_id] = self._make_sample(sequence, params, index, prompt.max_new_tokens)
        return job

    def _make_sample(self, sequence: Sequence, params: SamplingParams, index: int, max_new_tokens: int) -> Sample:
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        ending_ids = eos_ids | frozenset(params.stop_token_ids or ())
        skip_special_tokens = True if params.skip_special_tokens is None else params.skip_special_tokens
        return Sample(
            sequence=sequence,
            row=SamplingRow(params, sequence.token_ids, ending_ids, index),
            stream=TextStream(self._processor, params.stop or (), skip_special_tokens),
            ending_ids=ending_ids,
            max_new_tokens=max_new_tokens,
            runs_last_token=any(self._options.taps[port].tokens == "completion" for port in self._taps),
        )

    def _load(self, folder: Path, context: EngineContext) -> ModelRunner:
        model = context.models.get(
            model_key(folder, context.device, context.dtype),
            lambda: load_language_model(folder, context.device, context.dtype),
        )
        return ModelRunner(
            model,
            num_blocks=self._pool.num_blocks,
            block_size=self._options.block_size,
            tapped_layers=[layer for layers in self._taps.values() for layer in layers],
            can_sample=self._options.can_write,
            device=context.device,
            dtype=context.dtype,
        )

    def _omni_error(self, error: Exception) -> OmniError:
        return error if isinstance(error, OmniError) else stage_error(self._stage.name, error)


def _model_folder(stage: StageConfig) -> Path:
    if stage.model is None:
        raise ConfigError(f"stages.{stage.name}.model: missing, expected the folder of a language model")
    return resolve_model_folder(stage.model)


def _feeds_others(stage: StageConfig, config: OmniConfig) -> bool:
    return any(edge.stage == stage.name for other in config.stages.values() for edge in other.edges.values())
