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
        if self._is_inside():
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
        if self._late:  # it came after the last of them was done, and before this turn had ended
            self.do(lambda: None)

    def do(self, function: Callable[[], None]) -> None:
        """Calls a function in a turn: now, or at the end of the turn that this thread is in."""
        self._late.append(function)
        if not self._is_inside():
            with self.take():
                pass

    def _is_inside(self) -> bool:
        return self._owner == threading.get_ident() and self._lock.locked()

    def _do_late(self) -> None:
        while self._late:
            self._late.popleft()()
