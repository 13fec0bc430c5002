"""The WebSocket `/v1/audio/speech/stream`: text comes in pieces, sound goes out."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, WebSocket

from vllm_omni.entrypoints.server.context import call_of
from vllm_omni.entrypoints.server.http.event_socket import ClientGone, EventSocket
from vllm_omni.entrypoints.server.speaking.speech_session import SpeechSession

router = APIRouter()


@router.websocket("/v1/audio/speech/stream")
async def stream_speech(websocket: WebSocket) -> None:
    """session.config, input.text, input.done, session.close -> audio.start, the sound, audio.done, session.done."""
    call = call_of(websocket)
    socket = EventSocket(websocket, call.parts.settings)
    with suppress(ClientGone):
        await socket.accept()
        await SpeechSession(socket, call).run()
