"""Starts one child process, waits for its end, and knows how it ended. Owns the process and what it writes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from vllm_omni.utils.children.child import Child, start_child
from vllm_omni.utils.processes import end_in_words

MODULE, SERVICE = "vllm_omni.executor.process.child", "vllm_omni.executor.process.service"
TAIL_BYTES = 32_000  # of what a child has written, kept here
MAX_WORDS = 4_000  # of its end, told
NOISE = "Extension modules: "  # of a crash, a line with all that was imported
LAST_WORDS_S = 0.2  # that are waited for what an ended child has written; its own children may hold the pipe open


class Keeper:
    """A thread that starts the child and waits for it, so that none is ever a zombie. It lives as long as the child: on
    Linux a child dies with the thread that started it. on_end: called in that thread, once.
    """

    def __init__(
        self, name: str, files: Sequence[int], on_end: Callable[[], None], imports: Sequence[str] | None = ()
    ) -> None:
        """files: descriptors that the child gets, as arguments; closed here once it has. imports: what it will want, as
        of start_child; None: it is not to be forked.
        """
        self._files = files
        self._on_end = on_end
        self._imports = imports
        self._child: Child | None = None
        self._status: int | None = None  # the return code, once it has ended
        self._failure: Exception | None = None
        self._is_wanted = True
        self._tail = bytearray()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name=f"omni-process-{name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """None before it is started."""
        return None if self._child is None else self._child.pid

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def kill(self) -> None:
        """At once, also where it is stopped; nothing where it has ended."""
        with self._guard:
            self._is_wanted = False
            if self._child is not None:
                self._child.kill()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within that time."""
        self._thread.join(timeout_s)
        return self.has_ended

    def end(self) -> str:
        """How it ended: 'was killed by SIGKILL (out of memory?)', and the last lines that it wrote."""
        if self._failure is not None:
            return f"could not be started ({type(self._failure).__name__}: {self._failure})"
        words = "has ended" if self._status is None else end_in_words(self._status)
        lines = bytes(self._tail).decode("utf-8", "replace").splitlines()
        tail = "\n".join(line for line in lines if not line.startswith(NOISE)).strip()[-MAX_WORDS:]
        return f"{words}; the last that it wrote: {tail}" if tail else words

    def _keep(self) -> None:
        output: int | None = None
        try:
            if self._is_wanted:
                output, child = self._start()
                with self._guard:
                    self._child = child
                    if not self._is_wanted:  # any more: the first may take its time
                        child.kill()
        except Exception as error:  # no memory for another process, no descriptors
            self._failure = error
        finally:
            for file in self._files:
                os.close(file)
        if self._child is not None and output is not None:
            reader = threading.Thread(
                target=self._read, args=(output,), name=f"{self._thread.name}-output", daemon=True
            )
            reader.start()
            self._status = self._child.reap()
            reader.join(LAST_WORDS_S)
        self._on_end()

    def _start(self) -> tuple[int, Child]:
        """The child, and where what it prints can be read."""
        reading, writing = os.pipe()
        try:
            wanted, forks = [SERVICE, *(self._imports or ())], self._imports is not None
            return reading, start_child(MODULE, self._files, output=writing, imports=wanted, forks=forks)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)

    def _read(self, output: int) -> None:
        """What it writes goes to our stderr; its end is kept."""
        with os.fdopen(output, "rb", buffering=0) as printed:
            while content := printed.read(65536):
                self._tail = (self._tail + content)[-TAIL_BYTES:]
                with suppress(OSError, ValueError):  # the latter where somebody has closed it
                    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, content)
