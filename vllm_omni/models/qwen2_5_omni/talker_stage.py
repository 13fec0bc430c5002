"""An AR stage of speech: a thinker's states in, row by row as they are made, codes of sound out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from vllm_omni.config.schema import StageConfig
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARWork
from vllm_omni.engine.ar.options import STATE_PORTS, THINKER_PORTS, AROptions, KVPoolPlan
from vllm_omni.engine.ar.prompt import ARLimits
from vllm_omni.engine.ar.thinker_states import POSITIONS
from vllm_omni.engine.base import EngineContext, StageTask
from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.layers.sampler import SamplingRow
from vllm_omni.models.qwen2_5_omni.speakers import Speakers
from vllm_omni.models.qwen2_5_omni.talker import TalkerConfig, load_text_rows
from vllm_omni.models.qwen2_5_omni.talker_inputs import TextRows
from vllm_omni.models.qwen2_5_omni.talker_job import CODES, CodeSampling, TalkerJob
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.language_model import LanguageModelConfig
from vllm_omni.worker.ar.model_runner import ModelRunner

DEFAULTS = {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.05}  # as published
DEFAULT_MAX_TOKENS = 4096
NEVER = -1e9
BY_STAGE = "for text and speech give the parameters by stage, {stage: params}"


class TalkerWork(ARWork):
    """Codes follow a reply as it is written. Nothing of it can serve another request: no prefix is cached."""

    tapped_layers = frozenset()
    can_write = True
    prefix_caching = False

    @classmethod
    def signature(cls, stage: StageConfig, folder: Path, model: LanguageModelConfig) -> StageSignature:
        assert isinstance(model, TalkerConfig)
        options: AROptions = stage.options
        options.model_len(model)
        Speakers.load(folder)
        states = TensorSpec(("T", 2 * model.embedding_size))
        return StageSignature(
            inputs={**dict.fromkeys(STATE_PORTS, states), POSITIONS: TensorSpec(("T", 3))},
            outputs={CODES: TensorSpec(("T",))},
            required_inputs=THINKER_PORTS,
            meta=frozenset({"finish_reason", "prompt_tokens"}),
            streamed_inputs=THINKER_PORTS,
            streamed_outputs=frozenset({CODES}),
        )

    @classmethod
    def request_keys(cls, options: AROptions) -> frozenset[str]:
        return frozenset({"speaker"})

    def __init__(
        self, stage: StageConfig, context: EngineContext, folder: Path, model: LanguageModelConfig, pool: KVPoolPlan
    ) -> None:
        assert isinstance(model, TalkerConfig)
        self._model = model
        self._limits = ARLimits.of(stage.options, model, pool, context.config)
        self._gives_rows, self._gives_codes = CODES in context.streamed, CODES in context.wanted
        self._speakers = Speakers.load(folder)
        begins = [self._speakers.get(name).bos_token for name in self._speakers.names]
        tokens = sorted({*begins, model.text_end, model.text_pad})
        self._text = load_text_rows(folder, tokens, model.embedding_size, context.device, context.dtype)

    def check(self, request: OmniRequest, params: StageParams) -> None:
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params: got {type(params).__name__}, expected SamplingParams")
        self._speakers.get(request.fields.get("speaker"))
        if (params.n or 1) > 1:
            raise InvalidRequestError(f"n: got {params.n}, expected 1: a reply is spoken once")
        for name in ("stop", "logprobs", "skip_special_tokens"):
            if getattr(params, name) is not None:
                raise InvalidRequestError(f"{name}: speech has no words, and does not read it; {BY_STAGE}")
        if params.max_tokens is not None and (params.min_tokens or 0) > params.max_tokens:
            raise InvalidRequestError(
                f"min_tokens: got {params.min_tokens}, expected at most max_tokens ({params.max_tokens})"
            )
        for name, tokens in (("stop_token_ids", params.stop_token_ids or ()), ("logit_bias", params.logit_bias or ())):
            for token in tokens:
                if token >= self._model.vocab_size:
                    raise InvalidRequestError(
                        f"{name}: got {token}, expected a code below {self._model.vocab_size}; {BY_STAGE}"
                    )

    def start(self, task: StageTask, sequence_ids: Iterator[int], runner: ModelRunner) -> TalkerJob:
        self.check(task.request, task.params)
        given = task.params
        assert isinstance(given, SamplingParams)
        params = given.with_defaults(DEFAULTS)
        voice = self._speakers.get(task.request.fields.get("speaker"))
        model = self._model
        text = TextRows(self._text[voice.bos_token], self._text[model.text_end], self._text[model.text_pad])

        def begin(num_prompt_tokens: int) -> CodeSampling:
            return self._begin(task.request_id, next(sequence_ids), params, num_prompt_tokens)

        return TalkerJob(task, begin, text, model.embedding_size, self._gives_rows, self._gives_codes)

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        return float(params.max_tokens or DEFAULT_MAX_TOKENS) if isinstance(params, SamplingParams) else 0.0

    def _begin(self, request_id: str, sequence_id: int, params: SamplingParams, num_prompt_tokens: int) -> CodeSampling:
        model = self._model
        prompt = [model.codec_mask] * num_prompt_tokens + [model.codec_pad, model.codec_bos]
        room = min(self._limits.model_len, self._limits.pool_tokens) - len(prompt)
        if room < 1:
            raise StageError(
                f"the thinker's prompt: got {len(prompt)} tokens with the begin of the speech, expected fewer than "
                f"max_model_len ({self._limits.model_len}) and than the KV pool holds ({self._limits.pool_tokens}, as "
                f"{self._limits.pool_limited_by} sets it)"
            )
        max_new_tokens = min(params.max_tokens or DEFAULT_MAX_TOKENS, room)
        sequence = Sequence(sequence_id, request_id, prompt, max_tokens=len(prompt) + max_new_tokens)
        eos_ids = frozenset() if params.ignore_eos else frozenset({model.codec_pad, model.codec_end})
        ending_ids = eos_ids | frozenset(params.stop_token_ids or ())
        bias = {**(params.logit_bias or {}), **dict.fromkeys(model.silent_codes - ending_ids, NEVER)}
        row = SamplingRow(dataclasses.replace(params, logit_bias=bias), prompt, ending_ids)
        return CodeSampling(sequence, row, ending_ids, max_new_tokens)
