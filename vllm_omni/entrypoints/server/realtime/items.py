"""Items as a client sends them, read: sounds and pictures checked against what the model reads."""

from __future__ import annotations

import asyncio

from vllm_omni.entrypoints.server.http.api_error import ApiError, unsupported
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.realtime.conversation import Content, Message
from vllm_omni.entrypoints.server.realtime.pcm import decoded
from vllm_omni.entrypoints.server.requests.media_fetch import decode_base64, read_source
from vllm_omni.entrypoints.server.schemas.realtime import Item, Part
from vllm_omni.entrypoints.server.settings import ServerSettings

PARTS_OF = {
    "system": "input_text",
    "user": "input_text, input_audio, input_image",
    "assistant": "output_text, output_audio",
}


async def read_item(item: Item, model: ServedModel, settings: ServerSettings) -> Message:
    """ApiError 400 for what the model does not read, and for what is no sound or picture."""
    content = [
        await _content(part, f"item.content[{index}]", item.role, model, settings)
        for index, part in enumerate(item.content)
    ]
    return Message(item.role, content) if item.id is None else Message(item.role, content, item.id)


async def _content(part: Part, where: str, role: str, model: ServedModel, settings: ServerSettings) -> Content:
    if part.type not in PARTS_OF[role].split(", "):
        raise ApiError(
            400,
            f"{where}.type: got {part.type}, expected {PARTS_OF[role]} of role {role}",
            code="invalid_value",
            param=f"{where}.type",
        )
    if part.type in ("input_text", "output_text"):
        return Content(part.type, _given(part.text, f"{where}.text"))
    if part.type == "output_audio":  # what was said before; the sound itself tells the model nothing
        return Content(part.type, _given(part.transcript, f"{where}.transcript"))
    kind = "image" if part.type == "input_image" else "audio"
    if kind not in model.abilities.input_media:
        raise unsupported(f"{where}.type", f"got {part.type}, which this model does not read")
    if kind == "image":
        url = _given(part.image_url, f"{where}.image_url")
        source = await asyncio.to_thread(read_source, url, f"{where}.image_url", settings)
        return Content(part.type, source=source, data=url)
    field = f"{where}.audio"
    data = _given(part.audio, field)
    return sound(decode_base64(data, field), field, data, part.transcript or "")


def sound(samples: bytes, field: str, data: str, transcript: str = "") -> Content:
    """A part of the user's with sound in it."""
    return Content("input_audio", transcript, decoded(samples, field), data)


def _given(value: str | None, field: str) -> str:
    if value is None:
        raise ApiError(400, f"{field}: missing", code="missing_required_parameter", param=field)
    return value
