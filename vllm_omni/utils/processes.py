"""Of processes and their children: how one ends with its parent, and how one has ended. Imports nothing large."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Has the kernel kill this process with the thread that started it, even where this one is stopped; on Linux."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died meanwhile
        os._exit(1)


@contextmanager
def heedless_children() -> Iterator[None]:
    """What this thread starts in it takes no heed of SIGINT and SIGTERM from its first moment on, nor do its children:
    a terminal, or a service manager, signals all processes of a program that is to end, and the parent decides.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # what is blocked is inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP); as far as the system says, which is on Linux."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    except (OSError, IndexError):
        return False


def end_in_words(status: int) -> str:
    """What the return code of a `subprocess.Popen` says: 'was killed by SIGKILL (out of memory?)'."""
    if status >= 0:
        return f"ended with the exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
