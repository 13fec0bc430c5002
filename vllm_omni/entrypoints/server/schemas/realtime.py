"""What a client says on the WebSocket `/v1/realtime`: OpenAI's events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, Fields, Label
from vllm_omni.entrypoints.server.schemas.speech import VoiceId
from vllm_omni.media.time_stretch import MAX_SPEED, MIN_SPEED

MAX_PARTS = 64
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Data = str  # base64; its size is the event's
Modality = Literal["text", "audio"]
MaxTokens = Annotated[int, Field(ge=1)] | Literal["inf"]
NO_TOOLS: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}


class AudioFormat(Fields):
    """The only one: 16 bit, little-endian, mono."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class AudioInput(Fields):
    """Nothing listens for the end of a turn: the client commits."""

    format: AudioFormat | None = None


class AudioOutput(Fields):
    format: AudioFormat | None = None
    voice: Label | VoiceId | None = None
    speed: float | None = Field(None, ge=MIN_SPEED, le=MAX_SPEED)

    @property
    def voice_name(self) -> str | None:
        return self.voice.id if isinstance(self.voice, VoiceId) else self.voice


class SessionAudio(Fields):
    input: AudioInput | None = None
    output: AudioOutput | None = None


class Answering(Fields):
    """How the model answers: of a session, or of one response."""

    output_modalities: Annotated[list[Modality], Field(min_length=1, max_length=2)] | None = None
    instructions: Text | None = None
    audio: SessionAudio | None = None
    max_output_tokens: MaxTokens | None = None


class SessionOptions(Answering):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NO_TOOLS,
        "truncation": ("auto", "disabled"),
        "include": ([],),
    }

    type: Literal["realtime"] = "realtime"
    model: Label | None = None


class Part(Fields):
    """A piece of an item. `text`, `audio` or `image_url`, as its type says."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"detail": ("auto", "high")}

    type: Literal["input_text", "input_audio", "input_image", "output_text", "output_audio"]
    text: Text | None = None
    audio: Data | None = Field(None, description="base64 of 16 bit samples, 24 kHz, mono")
    image_url: Data | None = None
    transcript: Text | None = None


class Item(Fields):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "object": ("realtime.item",),
        "status": ("completed", "incomplete", "in_progress"),
    }

    type: Literal["message"]
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Part], Field(max_length=MAX_PARTS)]
    id: Label | None = None


class ResponseOptions(Answering):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NO_TOOLS

    conversation: Literal["auto", "none"] = "auto"
    input: Annotated[list[Item], Field(max_length=1_000)] | None = Field(
        None, description="instead of the conversation"
    )
    metadata: dict[str, Label] | None = Field(None, max_length=16)


class ClientEvent(Fields):
    type: str
    event_id: Label | None = None


class SessionUpdate(ClientEvent):
    session: SessionOptions


class ItemCreate(ClientEvent):
    item: Item
    previous_item_id: Label | None = Field(None, description="`root`: at the beginning; left out: at the end")


class ItemDelete(ClientEvent):
    item_id: Label


class ItemRetrieve(ClientEvent):
    item_id: Label


class ItemTruncate(ClientEvent):
    item_id: Label
    content_index: int = Field(ge=0)
    audio_end_ms: int = Field(ge=0)


class BufferAppend(ClientEvent):
    audio: Data


class BufferCommit(ClientEvent):
    pass


class BufferClear(ClientEvent):
    pass


class ResponseCreate(ClientEvent):
    response: ResponseOptions | None = None


class ResponseCancel(ClientEvent):
    response_id: Label | None = None


EVENTS: dict[str, type[ClientEvent]] = {
    "session.update": SessionUpdate,
    "conversation.item.create": ItemCreate,
    "conversation.item.delete": ItemDelete,
    "conversation.item.retrieve": ItemRetrieve,
    "conversation.item.truncate": ItemTruncate,
    "input_audio_buffer.append": BufferAppend,
    "input_audio_buffer.commit": BufferCommit,
    "input_audio_buffer.clear": BufferClear,
    "response.create": ResponseCreate,
    "response.cancel": ResponseCancel,
}
