"""A sign of life that costs the loop nothing: the time, which a small thread of the child writes into shared memory.
Beside it stands which of its stages has its turn.

A long step stops it as little as long loading does; a process that is stopped or dead-locked shows none.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable

PERIOD_S = 0.2
NUM_BYTES = mmap.PAGESIZE
TIME = struct.Struct("=d")  # monotonic seconds, which processes of one machine share
TURN = struct.Struct("=q")  # behind it


class Pulse:
    """Of one child. file: the memory, which both sides map; stays the caller's."""

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, NUM_BYTES)

    def beat(self) -> None:
        """The child lives."""
        TIME.pack_into(self._memory, 0, time.monotonic())

    def silent_s(self) -> float:
        """Seconds since the last beat."""
        (last,) = TIME.unpack_from(self._memory, 0)
        return max(0.0, time.monotonic() - last)

    def give_turn(self, number: int) -> None:
        """The stage of this number is at work in the child, 0: none."""
        TURN.pack_into(self._memory, TIME.size, number)

    @property
    def turn(self) -> int:
        """Which stage it is, or was when the child ended."""
        (number,) = TURN.unpack_from(self._memory, TIME.size)
        return int(number)

    def close(self) -> None:
        """Lets go of the memory; nothing is asked any more."""
        self._memory.close()

    def beat_on(self, parent: int, leave: Callable[[], object]) -> None:
        """In a thread, from now on. leave: what to do when the parent is another one, since it has died."""

        def run() -> None:
            while True:
                self.beat()
                if os.getppid() != parent:
                    leave()
                time.sleep(PERIOD_S)

        self.beat()
        threading.Thread(target=run, name="omni-pulse", daemon=True).start()
