"""One caller at a time, and what comes from inside a turn waits for its end. Knows nothing of what callers do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_omni.errors import SchedulerError


class Turn:
    """A lock that a garbage collector, a signal handler or a callback cannot enter twice.

    They run in the middle of whatever their thread is doing, so a second entry would see state that is half changed.
    What they want done is done at the end of the turn that they came into.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is
        self._late: deque[Callable[[], None]] = deque()  # asked for, and not done yet

    @contextmanager
    def take(self) -> Iterator[None]:
        """One turn; SchedulerError from inside another one of this thread."""
        if self.is_mine():
            raise SchedulerError(
                "called from inside a step, by a signal handler or a finaliser; call it after the step"
            )
        with self._lock:
            try:
                self._owner = threading.get_ident()
                yield
            finally:
                try:
                    self._do_late()
                finally:
                    self._owner = None
        self._catch_up()  # with what came after the last of them was done, and before this turn had ended

    def do(self, function: Callable[[], None]) -> None:
        """Calls a function in a turn: now, or at the end of the turn that somebody is in. Never waits: whoever runs
        inside something else may hold a lock that the other one needs.
        """
        self._late.append(function)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._late and self._lock.acquire(blocking=False):
            try:
                self._owner = threading.get_ident()
                self._do_late()
            finally:
                self._owner = None
                self._lock.release()

    def is_mine(self) -> bool:
        """Whether this thread is in the middle of a turn."""
        return self._owner == threading.get_ident() and self._lock.locked()

    def _do_late(self) -> None:
        while self._late:
            self._late.popleft()()
