"""The bodies of `/v1/audio/speech`, `/v1/audio/speech/batch` and `/v1/audio/generate`.

What a served graph reads besides is taken as a field too: its `request_fields` in `/v1/models`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, Body, Fields, GuidanceInterval, Label, Seed
from vllm_omni.media.time_stretch import MAX_SPEED, MIN_SPEED

SpeechFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
MAX_BATCH = 128


class OpenFields(Fields):
    """Fields with others beside them, which are the graph's own."""

    model_config = ConfigDict(extra="allow")
    # fields that some graphs read, with the values that ask nothing of one that does not
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def graph_fields_for(self, read: Collection[str]) -> dict[str, Any]:
        """Those of a graph that reads these keys; what asks nothing of it is left out."""
        return {
            key: value
            for key, value in self.graph_fields.items()
            if key in read or value not in self.harmless.get(key, ())
        }

    @property
    def graph_fields(self) -> Mapping[str, Any]:
        return self.model_extra or {}


class VoiceId(Fields):
    id: Label


class SpeechFields(OpenFields):
    """How something is said."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "instructions": ("",),
        "word_timestamps": (False,),
    }
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "non_streaming_mode": (False,),
        "x_vector_only_mode": (False,),
    }

    voice: Label | VoiceId | None = None
    response_format: SpeechFormat = "mp3"
    speed: float = Field(1.0, ge=MIN_SPEED, le=MAX_SPEED, description="at the same pitch")
    seed: Seed | None = None

    @property
    def voice_name(self) -> str | None:
        return self.voice.id if isinstance(self.voice, VoiceId) else self.voice


class SpeechBody(Body, SpeechFields):
    """As OpenAI's."""

    input: Text
    stream_format: Literal["sse", "audio"] = "audio"
    stream: bool = Field(False, description="vllm-omni's word for stream_format: sse")

    @property
    def wants_events(self) -> bool:
        return self.stream or self.stream_format == "sse"


class SpeechItem(SpeechFields):
    """One text of a batch, and what is other for it than for the rest."""

    input: Text


class SpeechBatchBody(Body, SpeechFields):
    """Texts that are said independently of each other; the fields beside `items` hold for all."""

    items: Annotated[list[SpeechItem], Field(min_length=1, max_length=MAX_BATCH)]

    def merged(self, item: SpeechItem) -> SpeechItem:
        """An item with what the batch says for all."""
        shared = {name: getattr(self, name) for name in SpeechFields.model_fields if name in self.model_fields_set}
        own = {name: getattr(item, name) for name in item.model_fields_set}
        return SpeechItem.model_validate({**shared, **self.graph_fields, **own})


class GenerateBody(Body, OpenFields):
    """Words about a sound or about music. `prompt` and `input`, `duration_s` and `audio_length` are the same."""

    prompt: Text | None = None
    input: Text | None = None
    duration_s: float | None = Field(None, gt=0, description="seconds")
    audio_length: float | None = Field(None, gt=0, description="seconds")
    negative_prompt: Text | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    guidance_interval: GuidanceInterval | None = None
    seed: Seed | None = None
    response_format: SpeechFormat = "wav"
    extra_params: dict[str, Any] | None = Field(None, max_length=1_000, description="what this model alone knows")
