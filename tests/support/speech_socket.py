"""A client of the WebSocket `/v1/audio/speech/stream`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.server import ServerProcess
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect


class Listener:
    """One client."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def say(self, **event: Any) -> None:
        self.socket.send(json.dumps(event))

    def hear(self, last: str) -> tuple[list[dict[str, Any]], list[bytes]]:
        """Events up to one of that type, and the frames between them."""
        events: list[dict[str, Any]] = []
        frames: list[bytes] = []
        while not events or events[-1]["type"] != last:
            message = self.socket.recv(timeout=60)
            if isinstance(message, bytes):
                frames.append(message)
            else:
                events.append(json.loads(message))
        return events, frames

    def complaint(self, **event: Any) -> dict[str, Any]:
        self.say(**event)
        return dict(self.hear("error")[0][-1]["error"])

    def end(self) -> int:
        """Reads to the end; the code with which the server closes."""
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                self.socket.recv(timeout=60)
        assert caught.value.rcvd is not None
        return caught.value.rcvd.code


@contextmanager
def listening(server: ServerProcess, **options: Any) -> Iterator[Listener]:
    url = server.base_url.replace("http", "ws") + "/audio/speech/stream"
    with connect(url, max_size=None, **options) as socket:
        yield Listener(socket)
