"""Runs chat templates in a process of their own, which the system limits in time and memory. Knows no messages.

A template is a program that a checkpoint brings: it may loop for ever or ask for all memory in one operation, which
nothing in the same process could stop.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.processes import heedless_children

MAX_CPU_S = 1.0  # processor time of one rendering; a published template needs less than a thousandth of it
MAX_WAIT_S = 20.0  # for an answer, where the system sets no such limit, or the machine is that busy
MAX_MEMORY_BYTES = 512 * 2**20  # of the process, which begins with about 30 MB
MAX_CHARS = 8_000_000  # of a rendered chat
PIECE_BYTES = 2**16  # of an answer, that are read at once
HOME = str(Path(__file__).parents[4])  # an editable installation need not be on the path
# the modules of this interpreter are found, and nothing else of it: neither its environment nor start-up files
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from vllm_omni.engine.ar.chat.render_process import main; main(*json.loads(sys.argv[2]))"
)


class TemplateSandbox:
    """Starts its process with the first rendering, or with `start`; one that was ended is replaced with the next.

    Safe to ask from any thread; one rendering at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes], int], TemplateSandbox] | None = None
        self._owner = os.getpid()
        self._is_late = False  # whether the last rendering took longer than anybody waits

    def start(self) -> None:
        """Starts the process, and does not wait until it is ready."""
        with self._lock:
            self._running()

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """values: plain JSON. InvalidRequestError for what the template raises, and for one that reaches a limit."""
        request = json.dumps({"template": template, "values": values}).encode() + b"\n"
        with self._lock:
            line = self._exchange(request)
            if line is None:
                raise InvalidRequestError(f"prompt: the chat template {self._cause_of_death()}")
        answer: dict[str, str] = json.loads(line)
        if "limit" in answer:
            raise InvalidRequestError(f"prompt: the chat template {answer['limit']} over these messages")
        if "error" in answer:
            raise InvalidRequestError(f"prompt: the chat template does not take these messages ({answer['error']})")
        return answer["text"]

    def close(self) -> None:
        """Ends the process; may be called twice, and something may be rendered afterwards."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._stop()
        self._owner = os.getpid()
        limits = (MAX_CPU_S, MAX_MEMORY_BYTES, MAX_CHARS)
        with heedless_children():
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", START, json.dumps([HOME, *sys.path]), json.dumps(limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        self._end = weakref.finalize(self, _end, self._process, self._owner)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # else a long request could wait for ever
        return self._process

    def _exchange(self, request: bytes) -> bytes | None:
        """The answer, or None where the process ended, or was ended because nobody waits longer. In this thread: to
        start another for its time would take longer than to render.
        """
        process, until = self._running(), time.monotonic() + MAX_WAIT_S
        assert process.stdin is not None and process.stdout is not None
        self._is_late = False
        try:
            _write(process.stdin.fileno(), request, until)
            return _read_line(process.stdout.fileno(), until)
        except TimeoutError:
            self._is_late = True
            process.kill()
            return None
        except OSError:
            return None
        except BaseException:  # an interrupt: the answer that comes later belongs to nobody
            self._stop()
            raise

    def _cause_of_death(self) -> str:
        """What the process that has just gone was ended for."""
        assert self._process is not None
        code = self._process.wait()
        self._stop()
        if self._is_late:
            return f"gives no answer for {MAX_WAIT_S:g} s over these messages; it may never end"
        if code == -signal.SIGPROF:
            return f"takes more than {MAX_CPU_S:g} s of processor time over these messages; it may never end"
        return f"ended its process (status {code}); it may use {MAX_MEMORY_BYTES // 2**20} MB of memory"

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _write(pipe: int, request: bytes, until: float) -> None:
    """Into a pipe that does not block."""
    left = memoryview(request)
    while left:
        _wait_for(pipe, select.POLLOUT, until)
        left = left[os.write(pipe, left) :]


def _read_line(pipe: int, until: float) -> bytes | None:
    """None where the pipe ends before the line."""
    pieces: list[bytes] = []
    while not pieces or not pieces[-1].endswith(b"\n"):
        _wait_for(pipe, select.POLLIN, until)
        piece = os.read(pipe, PIECE_BYTES)
        if not piece:
            return None
        pieces.append(piece)
    return b"".join(pieces)


def _wait_for(pipe: int, event: int, until: float) -> None:
    """TimeoutError where it is not ready by then; one whose other end is gone is ready."""
    ready = select.poll()
    ready.register(pipe, event)
    if not ready.poll(max(until - time.monotonic(), 0.0) * 1000):
        raise TimeoutError


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kills and reaps it, unless this is a fork of the process that it belongs to."""
    if os.getpid() == owner:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # something was left in its buffer
                pipe.close()
