"""The messages of a chat as the engine reads them: media as bytes, read beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.entrypoints.server.http.api_error import ApiError, unsupported
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.media_fetch import read_source
from vllm_omni.entrypoints.server.schemas.chat import (
    AnyPart,
    AudioPart,
    AudioUrlPart,
    ChatBody,
    ImagePart,
    ImageUrl,
    MediaUrl,
    Message,
    TextPart,
    VideoPart,
)
from vllm_omni.entrypoints.server.settings import ServerSettings

LOW_DETAIL_PIXELS = 512 * 512  # OpenAI's `detail: low`


async def chat_prompt(body: ChatBody, model: ServedModel, settings: ServerSettings) -> dict[str, Any]:
    """The prompt's keys. ApiError 400 for media that the model does not read or that cannot be had."""
    if not model.abilities.is_chat:
        return {"prompt": _one_text(body.messages)}
    given: dict[str, Any] = {}
    for name in ("chat_template_kwargs", "continue_final_message"):
        if getattr(body, name) is not None:
            if name not in model.abilities.request_keys:
                raise unsupported(name, "no stage of this model reads it; leave it out")
            given[name] = getattr(body, name)
    if not any(isinstance(message.content, list) for message in body.messages):
        messages = [_message(message, message.content) for message in body.messages]
    else:
        messages = await asyncio.to_thread(_with_media, body.messages, model, settings)
    return {"messages": messages, **given}


def _one_text(messages: Sequence[Message]) -> str:
    """The prompt of a graph that holds no conversation: one message of the user's."""
    if len(messages) != 1 or messages[0].role != "user":
        raise ApiError(
            400,
            f"messages: got {len(messages)}, expected one of the user's: this model reads a prompt, no conversation",
            code="unsupported_by_model",
            param="messages",
        )
    return _text_of(messages[0], "messages[0]")


def _text_of(message: Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = [part.text for part in message.content or () if isinstance(part, TextPart)]
    if len(texts) != len(message.content or ()):
        raise unsupported(f"{where}.content", "this model reads text alone")
    return "\n".join(texts)


def _with_media(messages: Sequence[Message], model: ServedModel, settings: ServerSettings) -> list[dict[str, Any]]:
    found = []
    for number, message in enumerate(messages):
        content: Any = message.content
        if isinstance(content, list):
            content = [
                _part(part, f"messages[{number}].content[{index}]", model, settings)
                for index, part in enumerate(content)
                if message.role != "assistant" or _is_read(part, model)
            ] or ""
        found.append(_message(message, content))
    return found


def _is_read(part: AnyPart, model: ServedModel) -> bool:
    """Otherwise it is left out of an answer that comes back: what a model drew it may never have seen itself."""
    return isinstance(part, TextPart) or _media_of(part)[0] in model.abilities.input_media


def _message(message: Message, content: Any) -> dict[str, Any]:
    """`developer` is the newer word for `system`; templates know the older one."""
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": content, **named}


def _part(part: AnyPart, where: str, model: ServedModel, settings: ServerSettings) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    kind, field, source, more = _media_of(part)
    if kind not in model.abilities.input_media:
        raise unsupported(where, f"got {kind}, which this model does not read")
    return {"type": kind, kind: read_source(source, f"{where}.{field}", settings), **more}


def _media_of(part: AnyPart) -> tuple[str, str, str, Mapping[str, Any]]:
    """(kind, the field that holds it, its source, what else is said of it)."""
    if isinstance(part, ImagePart):
        is_low = isinstance(part.image_url, ImageUrl) and part.image_url.detail == "low"
        return "image", "image_url", _url(part.image_url), {"max_pixels": LOW_DETAIL_PIXELS} if is_low else {}
    if isinstance(part, AudioPart):
        return "audio", "input_audio.data", part.input_audio.data, {}
    if isinstance(part, AudioUrlPart):
        return "audio", "audio_url", _url(part.audio_url), {}
    assert isinstance(part, VideoPart)
    return "video", "video_url", _url(part.video_url), {} if part.fps is None else {"fps": part.fps}


def _url(given: MediaUrl | str) -> str:
    return given if isinstance(given, str) else given.url
