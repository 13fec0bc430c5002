"""An AR stage over words: a prompt in, text and hidden states out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARWork
from vllm_omni.engine.ar.options import THINKER_PORTS, AROptions, KVPoolPlan
from vllm_omni.engine.ar.prompt import ARInput, ARLimits, read_prompt
from vllm_omni.engine.ar.text_job import Sample, TappedPort, TextJob
from vllm_omni.engine.ar.thinker_states import POSITIONS, ThinkerStates
from vllm_omni.engine.ar.tokenizer import TextProcessor, TextStream, end_of_sequence_ids, find_tokenizer
from vllm_omni.engine.base import EngineContext, StageTask
from vllm_omni.errors import ConfigError
from vllm_omni.layers.sampler import SamplingRow
from vllm_omni.models.qwen2_5_omni.prompt_reader import MediaProcessor
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.payload import PortSpec, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.language_model import LanguageModelConfig
from vllm_omni.worker.ar.media_inputs import MediaInputs
from vllm_omni.worker.ar.model_runner import ModelRunner


class TextWork(ARWork):
    """Task `generate` writes text, task `encode` computes the hidden states of a prompt; a thinker gives its states
    besides, whole or row by row.
    """

    @classmethod
    def signature(cls, stage: StageConfig, folder: Path, model: LanguageModelConfig) -> StageSignature:
        options: AROptions = stage.options
        where = f"stages.{stage.name}"
        if options.can_write and not model.can_write:
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
        options.model_len(model)
        layers = options.tapped_layers(model)
        outputs: dict[str, PortSpec] = {
            port: TensorSpec(("T", len(tapped) * model.hidden_size)) for port, tapped in layers.items()
        }
        if options.part == "thinker":
            outputs[POSITIONS] = TensorSpec(("T", 3))
        text = {"text": TextSpec()} if options.can_write else {}
        return StageSignature(
            inputs={"prompt": TextSpec()},
            outputs={**text, **{label: TextSpec() for label in options.sections}, **outputs},
            required_inputs=frozenset({"prompt"} & stage.inputs.keys()),  # the request's own is no stand-in for it
            results=frozenset(text),
            meta=options.meta_keys,
            streamed_outputs=THINKER_PORTS & outputs.keys() if options.part == "thinker" else frozenset(),
        )

    @classmethod
    def request_keys(cls, options: AROptions) -> frozenset[str]:
        return frozenset({"use_audio_in_video"} if options.part == "thinker" else ())

    def __init__(
        self, stage: StageConfig, context: EngineContext, folder: Path, model: LanguageModelConfig, pool: KVPoolPlan
    ) -> None:
        self._stage = stage
        self._options: AROptions = stage.options
        read = context.wanted | context.streamed
        layers = {port: tapped for port, tapped in self._options.tapped_layers(model).items() if port in read}
        self.tapped_layers = frozenset(layer for tapped in layers.values() for layer in tapped)
        self.can_write = self._options.can_write
        self.prefix_caching = self._options.prefix_caching
        self._taps = {
            port: TappedPort(tapped, self._options.taps[port].tokens == "completion")
            for port, tapped in layers.items()
            if port in self._options.taps
        }
        self._wanted, self._streamed = context.wanted, context.streamed
        self._gives_states = self._options.part == "thinker" and bool(THINKER_PORTS & read)
        self._state_layers = (0, model.num_layers)
        self._can_fan_out = not layers and not _feeds_others(stage, context.config)
        self._processor = TextProcessor(
            find_tokenizer(folder, self._options.tokenizer),
            chat_template=self._options.chat_template,
            template_kwargs=self._options.chat_template_kwargs,
            system_prompt=self._options.system_prompt,
        )
        limits = ARLimits.of(self._options, model, pool, context.config)
        reads_media = self._options.part == "thinker"
        media = MediaProcessor(folder, self._processor, context.config.limits) if reads_media else None
        self._input = ARInput(self._options, self._processor, limits, media)
        self._eos_ids = end_of_sequence_ids(folder, self._processor.tokenizer, self._options.part)

    def check(self, request: OmniRequest, params: StageParams) -> None:
        checked = self._input.check_params(params, self._can_fan_out)
        if "prompt" not in self._stage.inputs:
            self._input.check(request, checked)

    def start(self, task: StageTask, sequence_ids: Iterator[int], runner: ModelRunner) -> TextJob:
        params = self._input.check_params(task.params, self._can_fan_out)
        prompt = self._input.prepare_task(task, self._stage, params)
        job = TextJob(task, prompt, runner, self._options.sections)
        job.taps = self._taps
        if prompt.media is not None:
            job.media = MediaInputs(prompt.media, runner.encode, runner.device)
        for index in range((params.n or 1) if self.can_write else 1):
            sequence = Sequence(
                next(sequence_ids),
                task.request_id,
                list(prompt.token_ids),
                max_tokens=len(prompt.token_ids) + prompt.max_new_tokens,
                is_writing=self.can_write,
                content_ids=None if prompt.media is None else list(prompt.media.content_ids),
            )
            job.sequences.append(sequence)
            if self.can_write:
                job.samples[sequence.sequence_id] = self._make_sample(sequence, params, index, prompt.max_new_tokens)
        if self._gives_states:
            job.states = ThinkerStates(
                job.sequences[0], self._state_layers, self._wanted, self._streamed, job.media, runner.device
            )
        return job

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        prompt = read_prompt(self._options, request, {})
        num_prompt_tokens = len(prompt) / 4 if isinstance(prompt, str) else len(prompt)
        num_new_tokens = 0
        if self.can_write and isinstance(params, SamplingParams):
            num_new_tokens = (params.max_tokens or 256) * (params.n or 1)
        return num_prompt_tokens / 10 + num_new_tokens

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
            runs_last_token=any(tap.of_completion for tap in self._taps.values()),
        )


def _feeds_others(stage: StageConfig, config: OmniConfig) -> bool:
    return any(edge.stage == stage.name for other in config.stages.values() for edge in other.edges.values())
