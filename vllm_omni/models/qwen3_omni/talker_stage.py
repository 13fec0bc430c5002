"""The running half of an AR stage of speech: makes its jobs, and the frames of all of them in each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from torch import Tensor

from vllm_omni.core.ar.sequence import Sequence as TokenSequence
from vllm_omni.engine.ar.base import ARStage, Generation, Written
from vllm_omni.engine.ar.talker.frames import complete_frames, frame_draw
from vllm_omni.engine.ar.talker.job import CODES
from vllm_omni.engine.base import EngineContext
from vllm_omni.errors import StageError
from vllm_omni.layers.batched_draw import DrawSettings
from vllm_omni.layers.sampler import SamplingRow
from vllm_omni.messages import StageTask
from vllm_omni.models.qwen3_omni.talker import Talker
from vllm_omni.models.qwen3_omni.talker_job import TalkerJob
from vllm_omni.models.qwen3_omni.talker_rows import TalkerRows
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.frames.frame_writer import FrameWriter
from vllm_omni.worker.ar.model_runner import ModelRunner

if TYPE_CHECKING:
    from vllm_omni.models.qwen3_omni.talker_spec import TalkerSpec

DEFAULTS = {"temperature": 0.9, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.05}  # as published
OTHER_CODES = DrawSettings(temperature=1.0, top_k=50, top_p=0.8)  # of a frame, as published
GREEDY = DrawSettings(temperature=0)
DEFAULT_MAX_TOKENS = 4096
NEVER = -1e9


class TalkerStage(ARStage):
    """Speaks replies."""

    completes_tokens = True

    def __init__(self, spec: TalkerSpec, context: EngineContext, runner: ModelRunner) -> None:
        self._config, self._limits = spec.talker, spec.ar_limits
        self._gives_rows, self._gives_codes = CODES in context.reads.streamed, CODES in context.reads.whole
        self._model = cast(Talker, runner.model)
        variant = spec.model.weights_variant
        self._rows = TalkerRows(self._model, spec.model.folder, runner.device, runner.dtype, variant)
        self._writer = FrameWriter(
            self._model.code_predictor,
            self._model.codec_embedding,
            spec.options.max_num_seqs,
            runner.device,
            runner.dtype,
            runner.graphs,
        )

    def start(self, task: StageTask, sequence_ids: Iterator[int]) -> TalkerJob:
        assert isinstance(task.prepared, str) and isinstance(task.params, SamplingParams)
        params = task.params.with_defaults(DEFAULTS)
        return TalkerJob(
            task,
            frame_draw(GREEDY if params.temperature == 0 else OTHER_CODES, params),
            partial(self._begin, task.request_id, sequence_ids, params),
            self._config,
            self._rows,
            self._config.speakers[task.prepared],
            gives_rows=self._gives_rows,
            gives_codes=self._gives_codes,
        )

    def complete(self, written: Sequence[Written], states: Tensor) -> None:
        complete_frames(self._writer, written, states)

    def _begin(self, request_id: str, sequence_ids: Iterator[int], params: SamplingParams, num_rows: int) -> Generation:
        model = self._config
        room = min(self._limits.model_len, self._limits.pool_tokens) - num_rows
        if room < 1:
            raise StageError(
                f"the thinker's prompt: got {num_rows} tokens with the begin of the speech, expected fewer than "
                f"max_model_len ({self._limits.model_len}) and than the KV pool holds ({self._limits.pool_tokens}, as "
                f"{self._limits.pool_limited_by} sets it)"
            )
        max_new_tokens = min(params.max_tokens or DEFAULT_MAX_TOKENS, room)
        prompt = [model.codec.pad] * num_rows
        sequence = TokenSequence(next(sequence_ids), request_id, prompt, max_tokens=num_rows + max_new_tokens)
        eos_ids = frozenset() if params.ignore_eos else frozenset({model.codec.end})
        ending_ids = eos_ids | frozenset(params.stop_token_ids or ())
        unspoken = set(range(model.first_unspoken, model.vocab_size)) - ending_ids
        bias = {**(params.logit_bias or {}), **dict.fromkeys(sorted(unspoken), NEVER)}
        row = SamplingRow(dataclasses.replace(params, logit_bias=bias), (), ending_ids)
        return Generation(sequence, row, ending_ids, max_new_tokens)
