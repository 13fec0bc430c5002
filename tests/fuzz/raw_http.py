"""One connection to a server, over which any bytes may go; knows no route."""

from __future__ import annotations

import http.client
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import httpx

TIMEOUT_S = 25.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class Connection:
    """A context manager that closes it."""

    def __init__(self, place: httpx.URL) -> None:
        self._socket = socket.create_connection((place.host, place.port), TIMEOUT_S)

    def send(self, content: bytes) -> bool:
        """False where the server does not listen any more."""
        try:
            self._socket.sendall(content)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def end(self) -> None:
        """Says that nothing more will be sent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def leave(self, *, rudely: bool) -> None:
        """rudely: by a reset, with what was sent perhaps unread."""
        if rudely:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def read(self, most: int, timeout_s: float) -> bytes:
        """What comes within that time."""
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(most)
        except OSError:
            return b""

    def rest(self) -> bytes:
        """All that comes until the server closes; TimeoutError when it does not."""
        found = b""
        try:
            while piece := self._socket.recv(65_536):
                found += piece
        except ConnectionResetError:
            pass
        return found

    def answer(self, method: str = "POST") -> Answer | None:
        """The whole answer; None where the server closed without one. TimeoutError when neither comes."""
        response = http.client.HTTPResponse(self._socket, method=method)
        try:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())
        except (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected, http.client.IncompleteRead):
            return None
        finally:
            response.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
