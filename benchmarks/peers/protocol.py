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
from typing import Any

from benchmarks.measure import peak_memory_mb

# of (folder, dtype, threads): a loaded model, whose public methods are what questions may name besides. Of text:
# write(prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]], the token ids that follow each prompt,
# greedy, as many as asked for whatever they are. Of speech: see qwen_tts.py.
Load = Callable[[str, str, int], Any]


def serve(load: Load) -> None:
    """Answers questions until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    desk = _Desk(load)
    for line in sys.stdin:
        question = json.loads(line)
        started = time.perf_counter()
        try:
            result = desk.answer(question["method"], question["arguments"])
            answer = {"seconds": time.perf_counter() - started, "result": result}
        except Exception:
            answer = {"failure": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Desk:
    """Who is asked: `load` and `peak_memory_mb` are answered here, anything else by the model."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._engine: Any = None

    def answer(self, method: str, arguments: list[Any]) -> Any:
        if method == "peak_memory_mb":
            return peak_memory_mb()
        if method == "load":
            self._engine = self._load(*arguments)
            return None
        if self._engine is None:
            raise RuntimeError(f"{method}: got a question before a model, expected load; ask load first")
        return getattr(self._engine, method)(*arguments)
