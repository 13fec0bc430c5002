"""A peer's process as a suite sees it: asked like a side of ours, and stopped whenever it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from benchmarks.measure import ROOT
from benchmarks.sides import SideError

LAST_WORDS = 3000  # characters of its stderr that an error shows


class PeerProcess:
    """A process that speaks protocol.py; a context manager that ends it and all that it started."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.name = name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  what it prints: a pipe that nobody reads would fill
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> tuple[float, Any]:
        """(seconds inside the process, result) of one method. Between calls the process does not run at all: threads
        that wait by spinning would take their cores from the other sides.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"{self.name}: the process died; its last words:\n{self._last_words()}")
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "failure" in answer:
            raise SideError(f"{self.name}: {answer['failure']}\n{self._last_words()}")
        return float(answer["seconds"]), answer["result"]

    def peak_memory_mb(self) -> float:
        return float(self.call("peak_memory_mb")[1])

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._words):
            assert file is not None
            file.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        self._words.seek(0)
        return self._words.read().decode(errors="replace")[-LAST_WORDS:]
