"""How the loop sleeps while nothing can be done, and is woken from any thread."""

from __future__ import annotations

import threading


class Wake:
    """Called when there may be something to do; a call before `wait` ends it at once, so none is lost."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> None:
        self._event.set()

    def wait(self, timeout_s: float) -> None:
        """Returns at the first call since the last `wait`, or after `timeout_s` seconds."""
        self._event.wait(timeout_s)
        self._event.clear()
