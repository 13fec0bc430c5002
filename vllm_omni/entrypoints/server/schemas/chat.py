"""The body of `/v1/chat/completions`: OpenAI's fields, and those of diffusion for graphs that draw or sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, DiffusionFields, Fields, Label, SamplingFields

MAX_MESSAGES = 10_000
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Source = str  # a data URI, an allowed URL; its size is the body's
AudioFormat = Literal["wav", "mp3", "flac", "opus", "aac", "pcm16", "pcm"]


class MediaUrl(Fields):
    url: Source


class ImageUrl(MediaUrl):
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="low: as many pixels as 512x512 at most; else the model's own resolution"
    )


class InputAudio(Fields):
    data: Source
    format: Label | None = None  # what the file is shows in its bytes


class TextPart(Fields):
    type: Literal["text", "input_text"]
    text: Text


class ImagePart(Fields):
    type: Literal["image_url"]
    image_url: ImageUrl | Source


class AudioPart(Fields):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrlPart(Fields):
    type: Literal["audio_url"]
    audio_url: MediaUrl | Source


class VideoPart(Fields):
    type: Literal["video_url"]
    video_url: MediaUrl | Source
    fps: float | None = Field(None, gt=0)


AnyPart = Annotated[TextPart | ImagePart | AudioPart | AudioUrlPart | VideoPart, Field(discriminator="type")]


class SaidAudio(Fields):
    """The sound of an answer that comes back: its words are what counts, for no sound is kept."""

    id: Label | None = None
    data: Source | None = None
    expires_at: int | None = None
    transcript: Text | None = None
    sample_rate: int | None = None


class Message(Fields):
    """Also an answer as it was given: clients send it back with the next question."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],), "tool_calls": ([],)}

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[AnyPart] | None = None
    name: Label | None = None
    audio: SaidAudio | None = Field(None, description="of an answer; `transcript` stands in for a missing `content`")

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.audio is not None and self.role != "assistant":
            raise ValueError("audio: is of the assistant; say input_audio in a part of content")
        if self.content is None and self.audio is not None:
            self.content = self.audio.transcript
        if self.content is None:
            raise ValueError("content: missing; of what was heard, say the words")
        return self


class Voice(Fields):
    id: Label


class AudioOptions(Fields):
    voice: Label | Voice | None = None
    format: AudioFormat = "wav"


class StreamOptions(Fields):
    include_usage: bool = False
    include_progress: bool = Field(default=False, description="chunks with `progress`: steps by stage")
    include_obfuscation: Literal[False] = False


class ChatBody(SamplingFields, DiffusionFields):
    """As OpenAI's; what stands below `logprobs` is our own or vllm-omni's."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none",),
        "tools": ([],),
        "functions": ([],),
        "function_call": ("none",),
        "verbosity": ("medium",),
        "moderation": ("auto",),
        "top_logprobs": (0,),
        "num_outputs_per_prompt": (1,),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    modalities: list[Literal["text", "audio", "image"]] | None = Field(None, min_length=1, max_length=3)
    audio: AudioOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    partial_images: int | None = Field(None, ge=0, le=10, description="previews of each picture, in `delta.preview`")
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, Label] | None = Field(None, max_length=64, description="labels; change nothing")
    prompt_cache_key: Label | None = Field(None, description="a label; prefixes are cached by their content")
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=100)
    continue_final_message: bool | None = None
