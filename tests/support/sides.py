"""A benchmark's side in the tests' own process, where the side and not its process is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.measure import peak_memory_mb


class SideHere:
    """As benchmarks.sides.SideProcess, without a process."""

    def __init__(self, name: str, threads: int, make: Callable[..., Any], *arguments: Any) -> None:
        self.name = name
        self._side = make(*arguments)

    def call(self, method: str, *arguments: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        result = getattr(self._side, method)(*arguments)
        return time.perf_counter() - started, result

    def peak_memory_mb(self) -> float:
        return peak_memory_mb()

    def __enter__(self) -> SideHere:
        return self

    def __exit__(self, *raised: object) -> None:
        del self._side
