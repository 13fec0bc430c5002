"""What a peer's process and ours say to each other: one JSON object a line, a question on stdin, its answer on stdout.

Runs in the peer's environment, so the standard library is all that it imports. What the peer's libraries print goes to
stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks.measure import peak_memory_mb


class Engine(Protocol):
    """A loaded model."""

    def write(self, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        """The token ids that follow each prompt, greedy, as many as asked for whatever they are."""


Load = Callable[[str, str, int], Engine]  # of (folder, dtype, threads)


def serve(load: Load) -> None:
    """Answers questions until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    desk = _Desk(load)
    for line in sys.stdin:
        question = json.loads(line)
        started = time.perf_counter()
        try:
            result = getattr(desk, question["method"])(*question["arguments"])
            answer = {"seconds": time.perf_counter() - started, "result": result}
        except Exception:
            answer = {"failure": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Desk:
    """The methods that a question may name."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._engine: Engine | None = None

    def load(self, folder: str, dtype: str, threads: int) -> None:
        self._engine = self._load(folder, dtype, threads)

    def write(self, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        if self._engine is None:
            raise RuntimeError("write: got a question before a model, expected load; ask load first")
        return self._engine.write(prompts, new_tokens)

    def peak_memory_mb(self) -> Any:
        return peak_memory_mb()
