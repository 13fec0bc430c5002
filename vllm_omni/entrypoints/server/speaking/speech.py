"""Words that are said: the run that says them, and its sound as the bytes of a file while it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from vllm_omni.entrypoints.server.answers.encoding import AudioPieces
from vllm_omni.entrypoints.server.context import Call
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.building import build_request, graph_keys, require, voice_key
from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.entrypoints.server.schemas.base import Body
from vllm_omni.entrypoints.server.schemas.speech import SpeechFields
from vllm_omni.media.audio import Audio
from vllm_omni.params import DiffusionParams, SamplingParams
from vllm_omni.request import OmniOutput

SPEAKER = "speaker"  # vllm-omni's other word for voice
WHOLE_TEXT = "non_streaming_mode"  # asks for all text before the first sound


@dataclass(frozen=True, slots=True)
class Speaker:
    """One model, and how it is to say things; made by `speaker_of`, which has checked all of it."""

    call: Call
    model: ServedModel
    stage: str  # whose sound is heard
    keys: Mapping[str, Any]  # of the prompt, besides the words
    fields: SpeechFields
    body: Body  # deadline and priority

    @property
    def reads_pieces(self) -> bool:
        """Whether it says words as they come."""
        is_plain = self.model.config.prompts.speech is None and not self.keys.get(WHOLE_TEXT)
        return is_plain and self.model.abilities.reads_pieces

    def run(self, words: str | AsyncIterator[str], index: int = 0) -> Run:
        """words: pieces of them where it `reads_pieces`. index: of the run within the call. ApiError 400 for nothing to
        say.
        """
        if isinstance(words, str):
            if not words.strip():
                raise ApiError(400, f"input: got {words!r:.20}, expected words", code="invalid_value", param="input")
            words = self.model.config.prompts.for_speech(words)
        prompt = {"prompt": words, **self.keys}
        # one seed is the whole request's
        seed = self.fields.seed
        drawn: Any = {} if seed is None else self._seeded(seed)
        made = build_request(self.call, self.model, self.body, prompt, [self.stage], **drawn)
        if index:
            made = dataclasses.replace(made, request_id=f"{self.call.run_id}-{index}")
        return self.call.begin(made, self.model, wants_parts=True)

    def say(self, run: Run) -> Speech:
        parts = self.call.parts.runs.parts(run)
        return Speech(parts, AudioPieces(self.fields.response_format, self.fields.speed))

    def _seeded(self, seed: int) -> dict[str, Any]:
        if self.model.abilities.sampler is not None:
            return {"sampling": SamplingParams(seed=seed)}
        return {"diffusion": DiffusionParams(seed=seed)}


class Speech:
    """One run's sound. `first` and `final` are there when `pieces` has come so far."""

    def __init__(self, parts: AsyncGenerator[OmniOutput, None], encoder: AudioPieces) -> None:
        self._parts = parts
        self._encoder = encoder
        self.first: Audio | None = None
        self.final: OmniOutput | None = None

    @property
    def num_samples(self) -> int:
        """So far, at the speed at which the model speaks."""
        return self._encoder.num_samples

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The file's bytes, in order; none is empty. ApiError for a run that fails, and where there was no sound."""
        async with aclosing(self._parts) as parts:
            async for output in parts:
                data = b"".join([await self._encoder.add(audio) for audio in output.audios[:1]])
                self.first = self.first or next(iter(output.audios), None)
                if output.finished:
                    self.final = output
                    if self.first is None:
                        raise ApiError(400, "input: the model made no sound of it", code="no_audio", param="input")
                    data += await self._encoder.close()
                if data:
                    yield data


async def speaker_of(call: Call, model: ServedModel, fields: SpeechFields, body: Body) -> Speaker:
    """ApiError 400 for what this model does not do."""
    stage = require(model, "audio", model.abilities.audios)[0]
    if model.abilities.writer is not None and model.config.prompts.speech is None:
        raise ApiError(
            400,
            f"model: {model.name!r} replies to what it is told and does not read it out (its config has no "
            "prompts.speech); use /v1/chat/completions or /v1/audio/generate",
            code="unsupported_by_model",
            param="model",
        )
    given = fields.graph_fields_for(model.abilities.request_keys)
    voice = given.pop(SPEAKER, None)
    if voice is not None and fields.voice_name not in (None, voice):
        raise ApiError(400, f"{SPEAKER}: another one than voice; keep one", code="invalid_value", param=SPEAKER)
    if voice is not None and not isinstance(voice, str):
        raise ApiError(400, f"{SPEAKER}: expected a name", code="invalid_value", param=SPEAKER)
    keys = await graph_keys(model, given, call.parts.settings)
    keys |= voice_key(model, voice or fields.voice_name)
    return Speaker(call, model, stage, keys, fields, body)
