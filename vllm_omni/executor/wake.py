"""How the loop sleeps while nothing can be done: in one wait over all connections, which any thread can end."""

from __future__ import annotations

import selectors
import socket
import weakref
from collections.abc import Callable
from contextlib import suppress


class Wake:
    """Called when there may be something to do; a call before `wait` ends it at once, so none is lost.

    What is watched is read by its own callback, in the thread that waits.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._reading, self._writing = socket.socketpair()
        for end in (self._reading, self._writing):
            end.setblocking(False)
        self._close = weakref.finalize(self, _close, self._selector, self._reading, self._writing)
        self._close.atexit = False  # threads may still call
        self._selector.register(self._reading, selectors.EVENT_READ, self._drain)
        self._is_set = False
        self._listener: Callable[[], None] | None = None

    def __call__(self) -> None:
        if not self._is_set and self._close.alive:
            self._is_set = True
            with suppress(OSError):  # full, which wakes as well; closed in this moment
                self._writing.send(b"!")
        if self._listener is not None:
            self._listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """listener: is called at every call, in its thread; for who sleeps elsewhere while there is no work."""
        self._listener = listener

    def watch(self, file: int, on_ready: Callable[[], None], *, for_writing: bool = False) -> None:
        """`wait` also ends when the file can be read (or also written), and then calls `on_ready`. Again for a file
        that is watched: changes what is waited for.
        """
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if for_writing else 0)
        if not self._close.alive:
            return
        if file in self._selector.get_map():
            self._selector.modify(file, events, on_ready)
        else:
            self._selector.register(file, events, on_ready)

    def forget(self, file: int) -> None:
        """Before the file is closed; of one that is not watched nothing."""
        if self._close.alive and file in self._selector.get_map():
            self._selector.unregister(file)

    def wait(self, timeout_s: float) -> None:
        """Returns at the first call since the last `wait`, when a file is ready, or after `timeout_s` seconds."""
        for key, _ in self._selector.select(timeout_s):
            key.data()

    def close(self) -> None:
        """Lets go of its descriptors; may be called twice, and calls that come later do nothing."""
        self._close()

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while self._reading.recv(64):
                pass
        # Last: a call in between is not sent, but the caller of `wait` learns of it now. Were this first, what such a
        # call sends could be read here, and no later one would send anything.
        self._is_set = False


def _close(selector: selectors.BaseSelector, *ends: socket.socket) -> None:
    selector.close()
    for end in ends:
        end.close()
