"""The body of `/v1/chat/completions`: OpenAI's fields, and those of diffusion for graphs that draw or sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, DiffusionFields, Label, SamplingFields

MAX_MESSAGES = 10_000
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Source = str  # a data URI, an allowed URL; its size is the body's
AudioFormat = Literal["wav", "mp3", "flac", "opus", "aac", "pcm16", "pcm"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class MediaUrl(Part):
    url: Source
    detail: Literal["auto"] | None = None  # the model's own resolution


class InputAudio(Part):
    data: Source
    format: Label | None = None  # what the file is shows in its bytes


class TextPart(Part):
    type: Literal["text", "input_text"]
    text: Text


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: MediaUrl | Source


class AudioPart(Part):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrlPart(Part):
    type: Literal["audio_url"]
    audio_url: MediaUrl | Source


class VideoPart(Part):
    type: Literal["video_url"]
    video_url: MediaUrl | Source
    fps: float | None = Field(None, gt=0)


AnyPart = Annotated[TextPart | ImagePart | AudioPart | AudioUrlPart | VideoPart, Field(discriminator="type")]


class Message(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[AnyPart]
    name: Label | None = None


class Voice(Part):
    id: Label


class AudioOptions(Part):
    voice: Label | Voice | None = None
    format: AudioFormat = "wav"


class StreamOptions(Part):
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
