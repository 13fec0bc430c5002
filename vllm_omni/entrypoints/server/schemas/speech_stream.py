"""What a client says on the WebSocket `/v1/audio/speech/stream`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, Body, Fields
from vllm_omni.entrypoints.server.schemas.speech import SpeechFields, SpeechFormat
from vllm_omni.entrypoints.server.speaking.sentences import Granularity


class SessionConfig(Body, SpeechFields):
    """How all that follows is said; may be sent again. Each sentence is a file of its own."""

    type: Literal["session.config"]
    response_format: SpeechFormat = "pcm"
    split_granularity: Granularity = "none"
    encoding: Literal["binary", "base64"] = Field("binary", description="base64: events `audio.chunk`")


class InputText(Fields):
    type: Literal["input.text"]
    text: str = Field(max_length=MAX_TEXT)


class InputDone(Fields):
    type: Literal["input.done"]


class SessionClose(Fields):
    type: Literal["session.close"]


ClientEvent = SessionConfig | InputText | InputDone | SessionClose
EVENTS: dict[str, type[ClientEvent]] = {
    "session.config": SessionConfig,
    "input.text": InputText,
    "input.done": InputDone,
    "session.close": SessionClose,
}
