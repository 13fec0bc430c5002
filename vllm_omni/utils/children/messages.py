"""What a process and its child say to each other over a socket pair: maps of plain values, each with its length."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import msgpack

LENGTH_BYTES = 4
MAX_MESSAGE_BYTES = 2**20


def write_message(connection: socket.socket, message: Mapping[str, Any]) -> None:
    content = msgpack.packb(dict(message))
    connection.sendall(len(content).to_bytes(LENGTH_BYTES, "little") + content)


def read_message(connection: socket.socket) -> dict[str, Any] | None:
    """None where the other side is gone, or says what nobody says."""
    start = _read(connection, LENGTH_BYTES)
    length = 0 if start is None else int.from_bytes(start, "little")
    content = _read(connection, length) if 0 < length <= MAX_MESSAGE_BYTES else None
    message = None if content is None else msgpack.unpackb(content)
    return message if isinstance(message, dict) else None


def _read(connection: socket.socket, length: int) -> bytes | None:
    found = b""
    while len(found) < length:
        try:
            part = connection.recv(length - len(found))
        except OSError:
            return None
        if not part:
            return None
        found += part
    return found
