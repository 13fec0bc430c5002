"""How a session's model answers: what the client has set, and what it may set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.realtime.pcm import SAMPLE_RATE
from vllm_omni.entrypoints.server.requests.building import require, voice_key
from vllm_omni.entrypoints.server.schemas.realtime import Answering

FORMAT = {"type": "audio/pcm", "rate": SAMPLE_RATE}


@dataclass(frozen=True, slots=True)
class Manner:
    """Of a session; a response may say otherwise for itself."""

    modality: Literal["text", "audio"]  # audio brings its words along
    instructions: str | None = None
    voice: str | None = None
    speed: float = 1.0
    max_tokens: int | None = None  # of the words; None: the model's default

    @classmethod
    def of_model(cls, model: ServedModel) -> Manner:
        """ApiError 400 for a model that neither writes nor speaks."""
        able = model.abilities
        require(model, "text or audio", [*able.texts, *able.audios])
        return cls("audio" if able.audios else "text")

    def with_options(self, options: Answering, model: ServedModel) -> Manner:
        """ApiError 400 for what the model does not do."""
        changes: dict[str, Any] = {}
        if options.output_modalities is not None:
            modality = "audio" if "audio" in options.output_modalities else "text"
            require(model, modality, self._stages(model, modality))
            changes["modality"] = modality
        if options.instructions is not None:
            changes["instructions"] = options.instructions
        if options.max_output_tokens is not None:
            changes["max_tokens"] = None if options.max_output_tokens == "inf" else options.max_output_tokens
        output = None if options.audio is None else options.audio.output
        if output is not None and output.voice is not None:
            voice_key(model, output.voice_name)
            changes["voice"] = output.voice_name
        if output is not None and output.speed is not None:
            changes["speed"] = output.speed
        return dataclasses.replace(self, **changes)

    def outputs(self, model: ServedModel) -> list[str]:
        """The stages that are heard: of an audible answer the words too."""
        texts = list(model.abilities.texts[:1])
        return texts if self.modality == "text" else [*texts, model.abilities.audios[0]]

    def describe(self) -> Mapping[str, Any]:
        """The fields that sessions and responses have in common."""
        return {
            "output_modalities": [self.modality],
            "max_output_tokens": "inf" if self.max_tokens is None else self.max_tokens,
        }

    def describe_output(self, model: ServedModel) -> Mapping[str, Any]:
        voices = model.abilities.voices
        return {"format": FORMAT, "voice": self.voice or (voices[0] if voices else "default")}

    @staticmethod
    def _stages(model: ServedModel, modality: str) -> tuple[str, ...]:
        return model.abilities.audios if modality == "audio" else model.abilities.texts
