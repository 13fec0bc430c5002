"""Many answers in a few numbers: percentiles of every time, rates, errors, and how many kept to given limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_omni.entrypoints.bench.answer import MEASURES, Answer
from vllm_omni.entrypoints.bench.load import Run
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import did_you_mean

PERCENTILES = (50, 90, 95, 99)
Limits = Mapping[str, float]  # name of a measure -> the most seconds that it may be


def parse_limits(text: str | None) -> dict[str, float]:
    """'ttft=0.5,e2e=3' -> {"ttft": 0.5, "e2e": 3.0}; ConfigError says what is wrong with it."""
    found: dict[str, float] = {}
    for item in (text or "").split(",") if text else ():
        name, _, seconds = item.strip().partition("=")
        if name not in MEASURES:
            raise ConfigError(f"--goodput: got {name[:80]!r}{did_you_mean(name[:80], MEASURES)}")
        try:
            found[name] = float(seconds)
        except ValueError:
            found[name] = 0.0
        if not 0 < found[name] < float("inf"):
            raise ConfigError(f"--goodput: got {item.strip()[:80]!r}, expected NAME=SECONDS such as ttft=0.5")
    return found


def summarise(run: Run, limits: Limits) -> dict[str, Any]:
    """All answers together, and those of each work."""
    works = dict.fromkeys(answer.work for answer in run.answers)
    by_work = {name: [answer for answer in run.answers if answer.work == name] for name in works}
    return {
        "wall_s": run.wall_s,
        **_of(run.answers, run.wall_s, limits),
        "works": {name: _of(answers, run.wall_s, limits) for name, answers in by_work.items()},
    }


def _of(answers: Sequence[Answer], wall_s: float, limits: Limits) -> dict[str, Any]:
    good = [answer for answer in answers if answer.is_ok]
    num_kept = sum(_keeps(answer, limits) for answer in good)
    return {
        "num_requests": len(answers),
        "num_ok": len(good),
        "requests_per_s": len(good) / wall_s,
        "tokens_per_s": sum(answer.tokens for answer in good) / wall_s,
        "goodput": {"limits_s": dict(limits), "requests_per_s": num_kept / wall_s, "share": _share(num_kept, answers)},
        "latency_s": _latencies(good),
        "errors": dict(Counter(answer.status for answer in answers if not answer.is_ok).most_common()),
        "first_errors": {answer.status: answer.error for answer in reversed(answers) if not answer.is_ok},
    }


def _keeps(answer: Answer, limits: Limits) -> bool:
    """A limit on what an answer does not have (the first sound of a text) is kept."""
    measures = answer.measures()
    return all(measures.get(name, 0.0) <= limit for name, limit in limits.items())


def _share(num_kept: int, answers: Sequence[Answer]) -> float:
    return num_kept / len(answers) if answers else 0.0


def _latencies(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """By measure that some answer has: how many had it, their mean, percentiles and maximum."""
    found: dict[str, dict[str, float]] = {}
    measured = [answer.measures() for answer in answers]
    for name in MEASURES:
        values = [measures[name] for measures in measured if name in measures]
        if values:
            percentiles = np.percentile(values, PERCENTILES)
            found[name] = {
                "count": len(values),
                "mean": float(np.mean(values)),
                **{f"p{rank}": float(value) for rank, value in zip(PERCENTILES, percentiles, strict=True)},
                "max": max(values),
            }
    return found
