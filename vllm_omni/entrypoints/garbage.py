"""How often a process of ours looks for garbage: seldom while it imports and loads what stays, then as Python does, and
no more at its end.
"""

from __future__ import annotations

import gc
import threading

USUAL = gc.get_threshold()
WHILE_LOADING = 100_000  # new objects between two looks, instead of hundreds


def look_seldom() -> None:
    """Else a sixth of a start goes into looking through half a million objects, none of which is garbage."""
    gc.set_threshold(WHILE_LOADING, *USUAL[1:])


class SeldomLooks:
    """As `look_seldom`, from the first that enters to the last that leaves; then as it was, in a process that is not
    ours.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before = USUAL

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._before = gc.get_threshold()
                if self._before[0] > 0:  # at 0 it never looks
                    gc.set_threshold(max(self._before[0], WHILE_LOADING), *self._before[1:])
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                gc.set_threshold(*self._before)


while_loading = SeldomLooks()


def keep_what_is_there() -> None:
    """What is there now stays: half a million objects, which the collector need not look at now and then, with all
    threads stopped for a quarter of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*USUAL)


def look_no_more() -> None:
    """As a program ends: else the interpreter looks through all that is there, several times, before it lets go of it,
    which is a fifth of the time of a command that draws one picture.
    """
    gc.freeze()
