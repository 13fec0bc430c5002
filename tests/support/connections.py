"""Two ends of a connection in one process."""

from __future__ import annotations

import gc
import socket
from typing import Any

from vllm_omni.executor.process.connection import Connection
from vllm_omni.executor.process.segments import Segments
from vllm_omni.executor.wire.table import WireTypes


class Pair:
    """Both ends in this process, each with memory of its own."""

    def __init__(self, segments: Segments | None = None) -> None:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.here, self.there = segments or Segments(), Segments()
        self.near, self.far = (
            Connection(end, memory, WireTypes()) for end, memory in zip(ends, (self.here, self.there), strict=True)
        )

    def send(self, message: Any, *, back: bool = False, **keys: Any) -> Any:
        """What arrives at the other end."""
        one, other = (self.far, self.near) if back else (self.near, self.far)
        one.send(message, **keys)
        found: list[Any] = []
        while not found:
            found = other.receive()
            one.flush()
        (arrived,) = found
        return arrived

    def settle(self) -> None:
        """Both ends hear what the other has let go of."""
        gc.collect()
        for _ in range(3):
            for end in (self.near, self.far):
                end.flush()
                end.receive()

    def close(self) -> None:
        self.near.close()
        self.far.close()
