"""One WebSocket of `/v1/realtime`: the client's events, and what they do to its conversation."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vllm_omni.entrypoints.server.context import Call
from vllm_omni.entrypoints.server.http.api_error import ApiError, as_api_error, unsupported
from vllm_omni.entrypoints.server.http.client import cancel
from vllm_omni.entrypoints.server.http.event_socket import EventSocket, parse_event
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.realtime.answer import Answer, AnswerPlan
from vllm_omni.entrypoints.server.realtime.conversation import Conversation, Message
from vllm_omni.entrypoints.server.realtime.items import read_item, sound
from vllm_omni.entrypoints.server.realtime.manner import FORMAT, Manner
from vllm_omni.entrypoints.server.realtime.pcm import SAMPLE_BYTES, SAMPLE_RATE
from vllm_omni.entrypoints.server.requests.media_fetch import decode_base64
from vllm_omni.entrypoints.server.schemas import realtime as schemas
from vllm_omni.errors import OmniError
from vllm_omni.request import new_request_id

MAX_EVENT_CHARS = 16 * 1024**2
LIFETIME_S = 3600  # that a client may plan with; nothing ends by itself


class RealtimeSession:
    """Reads events in one task; answers are made in another, one at a time, and end with the session."""

    def __init__(self, socket: EventSocket, call: Call, model: ServedModel) -> None:
        self._socket = socket
        self._call = call
        self._model = model
        self._id = f"sess_{new_request_id()}"
        self._manner = Manner.of_model(model)
        self._conversation = Conversation(call.parts.settings.max_body_bytes)
        self._buffer = bytearray()  # sound that is not committed yet
        self._max_buffer_bytes = int(model.config.limits.max_audio_s * SAMPLE_RATE) * SAMPLE_BYTES
        self._answer: Answer | None = None  # the one that is being made
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()
        self._num_answers = 0

    async def run(self) -> None:
        """Until the client goes: then ClientGone."""
        answering = asyncio.ensure_future(self._make_answers())
        reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait({answering, reading}, return_when=asyncio.FIRST_COMPLETED)
            await (reading if reading.done() else answering)
        finally:
            await cancel(answering, reading)

    async def _read(self) -> None:
        await self._send({"type": "session.created", "session": self._describe()})
        conversation = {"id": self._conversation.id, "object": "realtime.conversation"}
        await self._send({"type": "conversation.created", "conversation": conversation})
        takers = self._takers()
        while True:
            event: dict[str, Any] = {}
            try:
                event = await self._socket.receive(MAX_EVENT_CHARS)
                parsed = parse_event(schemas.EVENTS, event)
                await takers[type(parsed)](parsed)
            except (ApiError, OmniError) as error:
                event_id = event.get("event_id")
                about = dict(as_api_error(error).body["error"])
                about["event_id"] = event_id if isinstance(event_id, str) else None
                await self._send({"type": "error", "error": about})

    async def _make_answers(self) -> None:
        while True:
            answer = await self._answers.get()
            await answer.run()
            self._answer = None

    def _takers(self) -> Mapping[type, Callable[[Any], Awaitable[None]]]:
        return {
            schemas.SessionUpdate: self._update_session,
            schemas.ItemCreate: self._create_item,
            schemas.ItemDelete: self._delete_item,
            schemas.ItemRetrieve: self._retrieve_item,
            schemas.ItemTruncate: self._truncate_item,
            schemas.BufferAppend: self._append,
            schemas.BufferCommit: self._commit,
            schemas.BufferClear: self._clear,
            schemas.ResponseCreate: self._create_response,
            schemas.ResponseCancel: self._cancel_response,
        }

    async def _update_session(self, event: schemas.SessionUpdate) -> None:
        if event.session.model not in (None, self._model.name):
            raise unsupported("session.model", f"is {self._model.name!r} for this session; open another one")
        self._manner = self._manner.with_options(event.session, self._model)
        await self._send({"type": "session.updated", "session": self._describe()})

    async def _create_item(self, event: schemas.ItemCreate) -> None:
        item = await read_item(event.item, self._model, self._call.parts.settings)
        await self._add(item, event.previous_item_id)

    async def _delete_item(self, event: schemas.ItemDelete) -> None:
        self._conversation.delete(event.item_id)
        await self._send({"type": "conversation.item.deleted", "item_id": event.item_id})

    async def _retrieve_item(self, event: schemas.ItemRetrieve) -> None:
        item = self._conversation.find(event.item_id).describe(with_data=True)
        await self._send({"type": "conversation.item.retrieved", "item": item})

    async def _truncate_item(self, event: schemas.ItemTruncate) -> None:
        self._conversation.truncate(event.item_id, event.content_index, event.audio_end_ms)
        about = {name: getattr(event, name) for name in ("item_id", "content_index", "audio_end_ms")}
        await self._send({"type": "conversation.item.truncated", **about})

    async def _append(self, event: schemas.BufferAppend) -> None:
        if "audio" not in self._model.abilities.input_media:
            raise unsupported("audio", "this model reads no sound")
        content = decode_base64(event.audio, "audio")
        if len(self._buffer) + len(content) > self._max_buffer_bytes:
            limit_s = self._model.config.limits.max_audio_s
            raise ApiError(
                400, f"audio: the buffer would be longer than {limit_s:g} s (limits.max_audio_s)", code="too_large"
            )
        self._buffer += content

    async def _commit(self, event: schemas.BufferCommit) -> None:
        if not self._buffer:
            raise ApiError(400, "the buffer is empty; append audio first", code="input_audio_buffer_commit_empty")
        samples = bytes(self._buffer)
        content = sound(samples, "input_audio_buffer", base64.b64encode(samples).decode())
        item = Message("user", [content])
        before = self._conversation.add(item)
        self._buffer.clear()
        await self._send({"type": "input_audio_buffer.committed", "previous_item_id": before, "item_id": item.id})
        await self._tell_of(item, before)

    async def _clear(self, event: schemas.BufferClear) -> None:
        self._buffer.clear()
        await self._send({"type": "input_audio_buffer.cleared"})

    async def _create_response(self, event: schemas.ResponseCreate) -> None:
        if self._answer is not None:
            raise ApiError(
                400,
                f"response {self._answer.id} is being made; wait for response.done, or cancel it",
                code="conversation_already_has_active_response",
            )
        options = event.response or schemas.ResponseOptions.model_validate({})
        items = list(self._conversation)
        if options.input is not None:
            items = [await read_item(item, self._model, self._call.parts.settings) for item in options.input]
        plan = AnswerPlan(
            self._call,
            self._model,
            self._manner.with_options(options, self._model),
            [dataclasses.replace(item, content=list(item.content)) for item in items],
            self._conversation if options.conversation == "auto" else None,
            self._num_answers,
            options.metadata,
        )
        self._num_answers += 1
        self._answer = Answer(plan, self._send)
        self._answers.put_nowait(self._answer)

    async def _cancel_response(self, event: schemas.ResponseCancel) -> None:
        answer = self._answer
        if answer is None or answer.is_cancelled or event.response_id not in (None, answer.id):
            raise ApiError(400, "there is no such response that is being made", code="response_cancel_not_active")
        answer.cancel()

    async def _add(self, item: Message, after: str | None) -> None:
        before = self._conversation.add(item, after)
        await self._tell_of(item, before)

    async def _tell_of(self, item: Message, before: str | None) -> None:
        about = {"previous_item_id": before, "item": item.describe()}
        await self._send({"type": "conversation.item.added", **about})
        await self._send({"type": "conversation.item.done", **about})

    async def _send(self, event: Mapping[str, Any]) -> None:
        await self._socket.send({"event_id": f"event_{new_request_id()}", **event})

    def _describe(self) -> dict[str, Any]:
        output = {**self._manner.describe_output(self._model), "speed": self._manner.speed}
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self._id,
            "model": self._model.name,
            "instructions": self._manner.instructions or "",
            "audio": {"input": {"format": FORMAT, "turn_detection": None}, "output": output},
            "tools": [],
            "tool_choice": "none",
            "expires_at": int(time.time()) + LIFETIME_S,
            **self._manner.describe(),
        }
