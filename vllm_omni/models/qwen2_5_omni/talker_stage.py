"""The running half of an AR stage of speech: makes its jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARStage, Generation
from vllm_omni.engine.ar.talker.inputs import TextRows
from vllm_omni.engine.ar.talker.job import CODES
from vllm_omni.engine.base import EngineContext
from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SamplingRow
from vllm_omni.messages import StageTask
from vllm_omni.models.qwen2_5_omni.speakers import Speaker
from vllm_omni.models.qwen2_5_omni.talker import load_text_rows
from vllm_omni.models.qwen2_5_omni.talker_job import TalkerJob
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.model_runner import ModelRunner

if TYPE_CHECKING:
    from vllm_omni.models.qwen2_5_omni.talker_spec import TalkerSpec

DEFAULTS = {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.05}  # as published
DEFAULT_MAX_TOKENS = 4096
NEVER = -1e9


class TalkerStage(ARStage):
    """Speaks replies. It reads a few rows of the thinker's embeddings besides its own weights."""

    def __init__(self, spec: TalkerSpec, context: EngineContext, runner: ModelRunner) -> None:
        self._model, self._limits = spec.talker, spec.ar_limits
        self._gives_rows, self._gives_codes = CODES in context.reads.streamed, CODES in context.reads.whole
        begins = [spec.speakers.get(name).bos_token for name in spec.speakers.names]
        tokens = sorted({*begins, self._model.text_end, self._model.text_pad})
        self._text = load_text_rows(
            spec.model.folder,
            tokens,
            self._model.embedding_size,
            runner.device,
            runner.dtype,
            spec.model.weights_variant,
        )

    def start(self, task: StageTask, sequence_ids: Iterator[int]) -> TalkerJob:
        voice, model = task.prepared, self._model
        assert isinstance(voice, Speaker) and isinstance(task.params, SamplingParams)
        params = task.params.with_defaults(DEFAULTS)
        end, pad = self._text[model.text_end], self._text[model.text_pad]
        text = TextRows((self._text[voice.bos_token],), (end,), pad)
        begin = partial(self._begin, task.request_id, sequence_ids, params)
        return TalkerJob(task, begin, text, model.embedding_size, self._gives_rows, self._gives_codes)

    def _begin(
        self, request_id: str, sequence_ids: Iterator[int], params: SamplingParams, num_prompt_tokens: int
    ) -> Generation:
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
        sequence = Sequence(next(sequence_ids), request_id, prompt, max_tokens=len(prompt) + max_new_tokens)
        eos_ids = frozenset() if params.ignore_eos else frozenset({model.codec_pad, model.codec_end})
        ending_ids = eos_ids | frozenset(params.stop_token_ids or ())
        bias = {**(params.logit_bias or {}), **dict.fromkeys(model.silent_codes - ending_ids, NEVER)}
        row = SamplingRow(dataclasses.replace(params, logit_bias=bias), prompt, ending_ids)
        return Generation(sequence, row, ending_ids, max_new_tokens)
