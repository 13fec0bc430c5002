"""The running half of the talker's stage: makes its jobs, and the frames of all of them in each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from vllm_omni.core.ar.sequence import Sequence as TokenSequence
from vllm_omni.engine.ar.base import ARStage, Generation, Written
from vllm_omni.engine.ar.talker.frames import complete_frames, frame_draw
from vllm_omni.engine.base import EngineContext
from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SamplingRow
from vllm_omni.media.reference_sound import read_reference
from vllm_omni.messages import StageTask
from vllm_omni.models.qwen3_tts.cloned_voice import ClonedVoice, VoiceCloner
from vllm_omni.models.qwen3_tts.prompt import Layout, Script, content_id, lay_out
from vllm_omni.models.qwen3_tts.prompt_rows import PromptRows
from vllm_omni.models.qwen3_tts.request import REF_AUDIO, SpeechRequest
from vllm_omni.models.qwen3_tts.sampling import FIRST_CODES
from vllm_omni.models.qwen3_tts.talker import Talker
from vllm_omni.models.qwen3_tts.talker_job import Opening, TalkerJob
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.frames.frame_writer import FrameWriter
from vllm_omni.worker.ar.model_runner import ModelRunner
from vllm_omni.worker.background import Stop

if TYPE_CHECKING:
    from vllm_omni.models.qwen3_tts.talker_spec import TalkerSpec

NEVER = -1e9


@dataclass(frozen=True, slots=True, eq=False)
class RecordedSpeech:
    """A request whose recording has been read."""

    speech: SpeechRequest
    samples: Tensor  # [n] float32 at 24 kHz


class TalkerStage(ARStage):
    """cloner: of a checkpoint that clones voices."""

    completes_tokens = True

    def __init__(
        self, spec: TalkerSpec, context: EngineContext, runner: ModelRunner, cloner: VoiceCloner | None
    ) -> None:
        self._config, self._limits, self._request_limits = spec.talker, spec.ar_limits, spec.limits
        self._reads = context.reads
        self._model = cast(Talker, runner.model)
        self._device = runner.device
        self._cloner = cloner
        self._rows = PromptRows(self._model, runner.device)
        self._writer = FrameWriter(
            self._model.code_predictor,
            self._model.codec_embedding,
            spec.options.max_num_seqs,
            runner.device,
            runner.dtype,
            runner.graphs,
        )

    def preparation(self, task: StageTask) -> Callable[[Stop], RecordedSpeech] | None:
        speech = task.prepared
        assert isinstance(speech, SpeechRequest)
        return None if speech.recording is None else partial(self._read, speech)

    def start(self, task: StageTask, sequence_ids: Iterator[int]) -> TalkerJob:
        assert isinstance(task.params, SamplingParams)
        voice, speech = None, task.prepared
        if isinstance(speech, RecordedSpeech):
            assert self._cloner is not None
            samples, speech = speech.samples, speech.speech
            voice = self._cloner.clone(samples, has_frames=bool(speech.script.reference))
        reference = None if voice is None else voice.frames
        params = task.params.with_defaults(FIRST_CODES)
        return TalkerJob(
            task,
            speech.script,
            partial(self._open, task.request_id, next(sequence_ids), params, speech.max_tokens, voice),
            frame_draw(speech.draw, params),
            torch.empty(0, self._config.num_codes, dtype=torch.int64) if reference is None else reference,
            self._reads,
        )

    def complete(self, written: Sequence[Written], states: Tensor) -> None:
        complete_frames(self._writer, written, states)

    def _read(self, speech: SpeechRequest, stop: Stop) -> RecordedSpeech:
        sound = read_reference(speech.recording, limits=self._request_limits, name=REF_AUDIO, stop=stop)
        return RecordedSpeech(speech, torch.from_numpy(sound))

    def _open(
        self,
        request_id: str,
        sequence_id: int,
        params: SamplingParams,
        max_tokens: int | None,
        voice: ClonedVoice | None,
        script: Script,
    ) -> Opening:
        frames = [] if voice is None or voice.frames is None else [tuple(frame) for frame in voice.frames.tolist()]
        layout = lay_out(script, self._config, frames)
        generation = self._generation(request_id, sequence_id, params, max_tokens, layout, voice)
        inputs = partial(self._rows.inputs, layout.rows, voice)
        return Opening(generation, layout, inputs, self._rows.text, self._config.text.end)

    def _generation(
        self,
        request_id: str,
        sequence_id: int,
        params: SamplingParams,
        max_tokens: int | None,
        layout: Layout,
        voice: ClonedVoice | None,
    ) -> Generation:
        model, num_rows = self._config, len(layout.rows)
        room = min(self._limits.model_len, self._limits.pool_tokens) - num_rows
        if room < 1:
            raise StageError(
                f"prompt: got {num_rows} tokens with its recording, expected fewer than max_model_len "
                f"({self._limits.model_len}) and than the KV pool holds ({self._limits.pool_tokens}, as "
                f"{self._limits.pool_limited_by} sets it)"
            )
        max_new_tokens = min(max_tokens or params.max_tokens or room, room)
        sequence = TokenSequence(
            sequence_id,
            request_id,
            [model.codec.pad] * num_rows,
            max_tokens=num_rows + max_new_tokens,
            content_ids=_content_ids(layout, voice),
        )
        eos_ids = frozenset() if params.ignore_eos else frozenset({model.codec.end})
        ending_ids = eos_ids | frozenset(params.stop_token_ids or ())
        unspoken = set(range(model.first_unspoken, model.vocab_size)) - ending_ids
        bias = {**(params.logit_bias or {}), **dict.fromkeys(sorted(unspoken), NEVER)}
        row = SamplingRow(dataclasses.replace(params, logit_bias=bias), (), ending_ids)
        return Generation(sequence, row, ending_ids, max_new_tokens)


def _content_ids(layout: Layout, voice: ClonedVoice | None) -> list[int]:
    spoken = "" if voice is None else voice.embedding.float().cpu().numpy().tobytes().hex()
    return [content_id(row.text, (row.code, row.frame, spoken if row.is_voice else "")) for row in layout.rows]
