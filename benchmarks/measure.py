"""What every suite shares: its options, statistics of repeated times, and the machine they were taken on.

Imports neither torch nor the package, so that the process that directs a suite stays small.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "diffusers")
MIN_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """repeats: timed runs of each side of each case. budget_s: after this long a case is not repeated further (but at
    least three times). dtype: of both sides. is_quick: tiny counts, which show that it runs and nothing else. peers:
    the folder of the environments of peers, None for where they are made by default. beside: the peers of text_peers
    that are measured, () for all.
    """

    threads: int
    repeats: int = 7
    budget_s: float = 120.0
    dtype: str = "float32"
    is_quick: bool = False
    peers: str | None = None
    beside: Sequence[str] = ()

    def is_enough(self, done: int, spent_s: float) -> bool:
        """Whether a case has been repeated often enough."""
        return done >= self.repeats or (done >= min(MIN_REPEATS, self.repeats) and spent_s > self.budget_s)


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a report: cells are text, as they are shown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Report:
    """What a suite found. figures: the raw numbers behind the tables, JSON-able."""

    suite: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def with_spread(values: Sequence[float], digits: int = 2) -> str:
    """'median (lowest - highest)'."""
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def peak_memory_mb() -> float:
    """The most memory that this process has held at once, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "avx512f": "AVX-512", "avx2": "AVX2"}  # best first


def machine(threads: int) -> dict[str, Any]:
    """The machine and the libraries, without a date."""
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    """With the best of its instructions: processors of one name differ by a factor of many."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in (info.read_text().splitlines() if info.is_file() else ())]
    about = {key.strip(): value.strip() for key, _, value in lines}
    model = about.get("model name") or platform.processor() or platform.machine()
    flags = about.get("flags", "").split()
    best = next((name for flag, name in INSTRUCTIONS.items() if flag in flags), None)
    return model if best is None else f"{model} ({best})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
