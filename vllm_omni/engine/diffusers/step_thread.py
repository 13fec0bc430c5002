"""A function that runs as a coroutine though it knows nothing of it: in a thread of its own, but only while its owner
waits for it. So exactly one of the two threads runs at any moment, and no lock is needed for what they share.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")
Pause = Callable[[], None]


class Abandoned(BaseException):
    """Raised inside `pause` when nobody wants the result any more; no Exception, so that nothing swallows it."""


class StepThread(Generic[T]):
    """Runs `function(pause)`; every call of `pause` in there hands control back to who called `resume`.

    The thread starts at the first `resume` and ends with the function, with `close`, or when this object is forgotten
    (so the function must not refer to it).
    """

    def __init__(self, function: Callable[[Pause], T], name: str) -> None:
        self._turns: _Turns[T] = _Turns(function, name)
        self._finalizer = weakref.finalize(self, self._turns.close)

    def resume(self) -> bool:
        """Lets the function run to its next pause or to its end; whether it has ended."""
        return self._turns.resume()

    def result(self) -> T:
        """What the function returned, or raises what it raised. Only after `resume` said that it has ended."""
        return self._turns.take_result()

    def close(self) -> None:
        """Ends the thread at once: `pause` raises Abandoned in it. Returns when it has ended; once is enough."""
        self._finalizer()


class _Turns(Generic[T]):
    """What both threads know: whose turn it is, and how the function ended."""

    def __init__(self, function: Callable[[Pause], T], name: str) -> None:
        self._function: Callable[[Pause], T] | None = function
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._its_turn = threading.Semaphore(0)
        self._our_turn = threading.Semaphore(0)
        self._is_running = False
        self._is_abandoned = False
        self._is_ended = False
        self._result: T | None = None
        self._error: BaseException | None = None

    def resume(self) -> bool:
        if self._is_ended or self._is_abandoned:
            raise RuntimeError("a coroutine that has ended was resumed")
        if not self._is_running:  # it is, when the wait below was interrupted by a signal
            self._is_running = True
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._its_turn.release()
        self._our_turn.acquire()
        self._is_running = False
        if self._is_ended:
            self._thread.join()
        return self._is_ended

    def take_result(self) -> T:
        if not self._is_ended or self._is_abandoned:
            raise RuntimeError("a coroutine was asked for its result before its end")
        error, self._error = self._error, None
        if error is not None:
            raise error
        return cast(T, self._result)

    def close(self) -> None:
        self._is_abandoned = True
        self._its_turn.release()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._function = self._result = self._error = None

    def _pause(self) -> None:
        if not self._is_abandoned:
            self._our_turn.release()
            self._its_turn.acquire()
        if self._is_abandoned:
            raise Abandoned

    def _run(self) -> None:
        try:
            function, self._function = self._function, None
            if function is not None:
                self._result = function(self._pause)
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._is_ended = True
            self._our_turn.release()
