"""A child process as its starter sees it, and how one is started."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from vllm_omni.utils.children.fork_client import ROOT, NotForkedError, fork_child
from vllm_omni.utils.processes import heedless_children


class Child(Protocol):
    """Its process id is its own until `reap`: nothing else is killed. One thread reaps; any may kill."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """At once, also where it is stopped; nothing where it has ended."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended, after so long at most; None: however long that takes."""

    def reap(self) -> int:
        """Its return code as `subprocess` has it, once it has ended; waits for that."""


def start_child(
    module: str,
    files: Sequence[int],
    *,
    output: int | None = None,
    imports: Sequence[str] = (),
    forks: bool = True,
) -> Child:
    """A process that calls `main` of the module, as `python -m` of it does, with strings: the numbers that these
    descriptors have there, and the process id of its parent, which it is to end with. They stay open here. It begins in
    another folder, is told nothing else, and leaves SIGINT and SIGTERM to its parent. output: descriptor of what it
    prints; None: as this process. imports: what it will want beside its own, a "MODULE" or a "MODULE:NAME" each.

    On Linux it is forked from a process that has imported them, so that only the first of several takes that time and
    memory. forks: not where it uses an accelerator, whose driver does not outlive a fork.
    """
    if forks:
        with suppress(NotForkedError):
            return fork_child(module, files, output, imports)
    return FreshChild(module, files, output)


class FreshChild:
    """One that imports everything itself. On Linux it dies with the thread that started it, if it asks for that."""

    def __init__(self, module: str, files: Sequence[int], output: int | None) -> None:
        with heedless_children():
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, files), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=files,
                cwd=ROOT,
            )
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        with self._lock:
            self._process.kill()

    def wait(self, timeout_s: float | None = None) -> bool:
        if self._process.returncode is None and timeout_s is None and hasattr(os, "waitid"):
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            return True
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
            return True
        return False

    def reap(self) -> int:
        self.wait()
        with self._lock:
            return self._process.wait()
