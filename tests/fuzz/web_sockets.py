"""Odd conversations over the WebSockets of a server: events out of order, changed or cut off, and sudden ends."""

from __future__ import annotations

import base64
import json
from random import Random
from typing import Any

from fuzz.http_inputs import odd_event
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

READ_S = 0.3  # how long an answer to one event is waited for
MAX_READ = 40  # messages that are read behind one event
SOUND = base64.b64encode(b"\0\0" * 2_400).decode()
_ITEM: dict[str, Any] = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "read 3"}]}
EVENTS: dict[str, list[dict[str, Any]]] = {
    "/v1/audio/speech/stream": [
        {"type": "session.config", "model": "tiny-speech", "voice": "Reader", "seed": 1, "response_format": "pcm"},
        {"type": "session.config", "model": "tiny-speech", "encoding": "base64", "split_granularity": "sentence"},
        {"type": "input.text", "text": "read 3. read 7."},
        {"type": "input.done"},
        {"type": "session.close"},
    ],
    "/v1/realtime?model=tiny-speech": [
        {"type": "session.update", "session": {"type": "realtime", "instructions": "x", "output_modalities": ["text"]}},
        {"type": "conversation.item.create", "item": _ITEM},
        {"type": "conversation.item.retrieve", "item_id": "x"},
        {"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 10},
        {"type": "conversation.item.delete", "item_id": "x"},
        {"type": "input_audio_buffer.append", "audio": SOUND},
        {"type": "input_audio_buffer.commit"},
        {"type": "input_audio_buffer.clear"},
        {"type": "response.create", "response": {"output_modalities": ["audio"], "max_output_tokens": 5}},
        {"type": "response.create"},
        {"type": "response.cancel"},
    ],
}
EVENTS["/v1/realtime?model=tiny-omni"] = EVENTS["/v1/realtime?model=tiny-speech"]


def converse(address: str, random: Random) -> tuple[list[tuple[str, str]], str]:
    """(sent so far, received) of every text that came, and a word for how it ended. AssertionError where the server
    broke down over it.
    """
    route = random.choice(list(EVENTS))
    found: list[tuple[str, str]] = []
    sent = ""
    url = address.replace("http", "ws", 1) + (route if random.random() < 0.95 else route.replace("tiny", "no"))
    try:
        with connect(url, open_timeout=20, close_timeout=5, max_size=None, ping_interval=None) as socket:
            for number in range(random.randrange(1, 8)):
                plain = EVENTS[route][min(number, 2)] if random.random() < 0.5 else random.choice(EVENTS[route])
                event = odd_event(plain, random)
                sent += str(event)
                socket.send(event)
                _read(socket, random, sent, found)
            if random.random() < 0.5:
                socket.socket.close()
                return found, "frames: left"
        return found, "frames: closed"
    except InvalidStatus as error:
        body = json.loads(error.response.body or b"{}")
        assert error.response.status_code in (404, 503) and "error" in body, f"{error.response.status_code} {body}"
        return found, f"frames: {error.response.status_code}"
    except ConnectionClosed as error:
        code = None if error.rcvd is None else error.rcvd.code
        assert code not in (None, 1006, 1011), f"closed with {code} over {sent[-500:]}"
        return found, f"frames: closed with {code}"


def _read(socket: ClientConnection, random: Random, sent: str, found: list[tuple[str, str]]) -> None:
    """Some of what comes."""
    for _ in range(random.choice([0, 1, 3, MAX_READ])):
        try:
            message = socket.recv(timeout=READ_S)
        except TimeoutError:
            return
        if isinstance(message, str):
            found.append((sent, message))
