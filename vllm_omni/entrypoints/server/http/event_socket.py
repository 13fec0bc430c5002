"""One WebSocket: events as JSON in and out, within limits. Knows no protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.http.client import within
from vllm_omni.entrypoints.server.http.invalid import invalid_field
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.utils.checks import did_you_mean

CLOSED_NORMALLY, TOO_LARGE, TIMED_OUT = 1000, 1009, 1008
E = TypeVar("E", bound=BaseModel)


class ClientGone(Exception):
    """Nobody is there any more, or nobody reads what is sent."""


class EventSocket:
    """Sending may be done from several tasks; every message is sent whole."""

    def __init__(self, websocket: WebSocket, settings: ServerSettings) -> None:
        self._websocket = websocket
        self._settings = settings

    async def accept(self, subprotocol: str | None = None) -> None:
        """subprotocol: is agreed to where the client offers it."""
        offered = self._websocket.scope.get("subprotocols", ())
        await self._websocket.accept(subprotocol if subprotocol in offered else None)

    async def refuse(self, error: ApiError) -> None:
        """Before `accept`: an ordinary HTTP answer."""
        await self._websocket.send_denial_response(error.response())

    async def receive(self, max_chars: int, timeout_s: float | None = None) -> dict[str, Any]:
        """The next event. asyncio.TimeoutError when none comes, ClientGone, ApiError 400 for what is no event and 413
        for one that is too long.
        """
        receiving = self._websocket.receive()
        message = await (receiving if timeout_s is None else within(receiving, timeout_s))
        if message["type"] == "websocket.disconnect":
            raise ClientGone
        text = message.get("text")
        if text is None:
            raise ApiError(400, "got bytes, expected an event as JSON", code="invalid_event")
        if len(text) > max_chars:
            raise ApiError(
                413, f"got an event of {len(text)} characters, expected at most {max_chars}", code="too_large"
            )
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            raise ApiError(400, "got text that is no JSON", code="invalid_json") from None
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise ApiError(400, "got JSON without a type, expected an event", code="invalid_event", param="type")
        return event

    async def gone(self) -> None:
        """Returns when the client has closed the connection; what it sends meanwhile is lost."""
        while (await self._websocket.receive())["type"] != "websocket.disconnect":
            pass

    async def send(self, event: Mapping[str, Any]) -> None:
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        # a lone surrogate cannot be sent
        await self._sent(self._websocket.send_text(text.encode("utf-8", "backslashreplace").decode()))

    async def send_bytes(self, content: bytes) -> None:
        await self._sent(self._websocket.send_bytes(content))

    async def close(self, code: int = CLOSED_NORMALLY) -> None:
        await self._sent(self._websocket.close(code))

    async def _sent(self, sending: Awaitable[None]) -> None:
        try:
            await within(sending, self._settings.write_timeout_s)
        except (OSError, RuntimeError, asyncio.TimeoutError, WebSocketDisconnect):
            raise ClientGone from None


def parse_event(kinds: Mapping[str, type[E]], event: Mapping[str, Any]) -> E:
    """The event as what its type says; ApiError 400 with the field that is wrong."""
    kind = kinds.get(event["type"])
    if kind is None:
        got, near = event["type"][:80], did_you_mean(event["type"][:80], kinds)
        raise ApiError(400, f"type: got {got!r}{near}", code="invalid_value", param="type")
    try:
        return kind.model_validate(event)
    except ValidationError as error:
        raise invalid_field(error.errors()[0]) from None
