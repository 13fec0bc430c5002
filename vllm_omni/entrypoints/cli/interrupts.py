"""What Ctrl-C does to the command line: exit code 130, quietly, at any moment.

A KeyboardInterrupt is raised wherever Python happens to be: libraries that are being imported swallow it, or turn it
into an error or an abort of their own. So the process ends at once, but where files are being written.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # 128 and the number of the signal, as shells say it


def exit_on_interrupt() -> None:
    """From now on Ctrl-C ends the process. In a process that ignores it (`nohup`, `&` of a script) it stays ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _exit)


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """KeyboardInterrupt within, for what has something to tidy up."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not _exit:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _exit)


@contextmanager
def interrupts_noted() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C sets the event, for who stops at the next step; a second one ends the process."""
    noted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.is_set():
            _exit(number, frame)
        noted.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _exit(_number: int, _frame: FrameType | None) -> None:
    if os.isatty(2):
        os.write(2, b"\n")  # behind a progress bar
    os._exit(INTERRUPTED)
