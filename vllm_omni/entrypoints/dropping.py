"""What is dropped without being shut down: ended in a thread of its own, for which the end of the interpreter waits.

Not where it is dropped: the collector runs in the middle of anything, with any lock held that ending may need
(`threading` has such locks itself). And an interpreter that ends takes its lock from all threads: one that is freeing a
tensor would abort the whole process.
"""

from __future__ import annotations

import _thread
import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable

EXIT_S = 10.0  # the most that the end of the interpreter waits
_under_way: list[_thread.LockType] = []  # held until what was dropped is freed


def end_when_dropped(
    owner: object, end: Callable[[], object]
) -> weakref.finalize[[list[Callable[[], object]]], object]:
    """Calls `end` when `owner` is dropped, not when the interpreter ends. `detach` what it returns to prevent it."""
    found = weakref.finalize(owner, _begin, [end])
    found.atexit = False
    return found


def _begin(box: list[Callable[[], object]]) -> None:
    lock = _thread.allocate_lock()
    lock.acquire()
    _under_way.append(lock)
    try:
        _thread.start_new_thread(_hand_over, (box, lock))
    except RuntimeError:  # the interpreter ends: what is left goes with it
        _under_way.remove(lock)


def _hand_over(box: list[Callable[[], object]], lock: _thread.LockType) -> None:
    """To a thread that `threading` knows: one that it meets by chance is listed for ever."""
    try:
        threading.Thread(target=_end, args=(box, lock), daemon=True).start()
    except RuntimeError:  # from Python 3.12 on none is started any more while the interpreter ends
        _end(box, lock)


def _end(box: list[Callable[[], object]], lock: _thread.LockType) -> None:
    """box: so that nothing holds what is freed once it has ended."""
    try:
        box.pop()()
    finally:
        _under_way.remove(lock)
        lock.release()


def _wait() -> None:
    deadline = time.monotonic() + EXIT_S
    for lock in list(_under_way):
        lock.acquire(timeout=max(0.0, deadline - time.monotonic()))


atexit.register(_wait)
if hasattr(os, "register_at_fork"):  # the threads stay with the parent
    os.register_at_fork(after_in_child=_under_way.clear)
