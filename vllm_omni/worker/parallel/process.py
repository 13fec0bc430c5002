"""The process of one follower as its first rank sees it: started with one end of a socket pair, which nobody else can
reach; over it the follower is told what it is, says that it is loaded, and leaves its last words.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack

from vllm_omni.utils.processes import end_in_words, is_stopped

LENGTH_BYTES = 4
MAX_MESSAGE_BYTES = 2**20
MODULE = "vllm_omni.worker.parallel.follower"
READY, FAILED = "ready", "failed"


class FollowerProcess:
    """Started when it is made, from a thread that lives as long as it: the system kills it when that ends."""

    def __init__(self, rank: int, orders: Mapping[str, Any]) -> None:
        self.rank = rank
        self.socket, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": _python_path()},
            )
        finally:
            theirs.close()
        write_message(self.socket, orders)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return is_stopped(self.pid)

    def end(self) -> str:
        """Kills it, where it still runs; how it ended, in words."""
        if self._process.poll() is None:
            self._process.kill()
        status = self._process.wait()
        self.socket.close()
        return end_in_words(status)

    def wait_for_end(self, wait_s: float) -> str:
        """As `end`, of one that has closed its socket and gets a moment to end by itself."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        return self.end()


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


def _python_path() -> str:
    """So that the follower finds the package that runs here."""
    root = str(Path(__file__).parents[3])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
