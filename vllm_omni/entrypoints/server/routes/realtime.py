"""The WebSocket `/v1/realtime`: a conversation in OpenAI's events."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, WebSocket

from vllm_omni.entrypoints.server.context import call_of
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.http.event_socket import ClientGone, EventSocket
from vllm_omni.entrypoints.server.realtime.session import RealtimeSession

router = APIRouter()
SUBPROTOCOL = "realtime"  # which browsers offer


@router.websocket("/v1/realtime")
async def converse(websocket: WebSocket) -> None:
    """Text or sound in, text and sound out. `?model=` names the model; the client says when it is done (commit)."""
    call = call_of(websocket)
    socket = EventSocket(websocket, call.parts.settings)
    with suppress(ClientGone):
        try:
            session = RealtimeSession(socket, call, call.parts.models.find(websocket.query_params.get("model")))
        except ApiError as error:
            await socket.refuse(error)
            return
        await socket.accept(SUBPROTOCOL)
        await session.run()
