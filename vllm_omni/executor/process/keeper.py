"""Starts one child process, waits for its end, and knows how it ended. Owns the process and what it writes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from vllm_omni.utils.processes import end_in_words

MODULE = "vllm_omni.executor.process.child"
TAIL_BYTES = 4_000
LAST_WORDS_S = 0.2  # that are waited for what an ended child has written; its own children may hold the pipe open


class Keeper:
    """A thread that starts the child and waits for it, so that none is ever a zombie. It lives as long as the child: on
    Linux a child dies with the thread that started it. on_end: called in that thread, once.
    """

    def __init__(self, name: str, files: Sequence[int], on_end: Callable[[], None]) -> None:
        """files: descriptors that the child gets, under the same numbers, as arguments; closed here once it has."""
        self._files = files
        self._on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: Exception | None = None
        self._is_wanted = True
        self._tail = bytearray()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name=f"omni-process-{name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """None before it is started."""
        return None if self._process is None else self._process.pid

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def kill(self) -> None:
        """At once, also where it is stopped; nothing where it has ended."""
        with self._guard:
            self._is_wanted = False
            if self._process is not None and self._process.returncode is None:
                self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within that time."""
        self._thread.join(timeout_s)
        return self.has_ended

    def end(self) -> str:
        """How it ended: 'was killed by SIGKILL (out of memory?)', and the last lines that it wrote."""
        if self._failure is not None:
            return f"could not be started ({type(self._failure).__name__}: {self._failure})"
        status = None if self._process is None else self._process.returncode
        words = "has ended" if status is None else end_in_words(status)
        tail = bytes(self._tail).decode("utf-8", "replace").strip()
        return f"{words}; the last that it wrote: {tail}" if tail else words

    def _keep(self) -> None:
        try:
            with self._guard:
                if self._is_wanted:
                    self._process = self._start()
        except Exception as error:  # no memory for another process, no descriptors
            self._failure = error
        finally:
            for file in self._files:
                os.close(file)
        if self._process is not None:
            reader = threading.Thread(target=self._read, name=f"{self._thread.name}-output", daemon=True)
            reader.start()
            self._wait_for_end(self._process)
            reader.join(LAST_WORDS_S)
        self._on_end()

    def _start(self) -> subprocess.Popen[bytes]:
        arguments = [*map(str, self._files), str(os.getpid())]
        root = Path(__file__).resolve().parents[3]  # whose package it is to import; it goes elsewhere then
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            pass_fds=self._files,
            cwd=root,
        )

    def _wait_for_end(self, process: subprocess.Popen[bytes]) -> None:
        """Not reaped before `kill` is shut out, so that no other process can have its number."""
        if hasattr(os, "waitid"):
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        with self._guard:
            process.wait()

    def _read(self) -> None:
        """What it writes goes to our stderr; its end is kept."""
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as output:
            while content := output.read(65536):
                self._tail = (self._tail + content)[-TAIL_BYTES:]
                with suppress(OSError, ValueError):  # the latter where somebody has closed it
                    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, content)
