"""What the replicas of a stage come to together, of what each says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PLACE = ("pid", "host", "node")  # what `StageExecutor.place` says


def merged_status(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of `StageHost.get_status`, at least one: a stage is as its best replica."""
    best = min(replicas, key=lambda replica: (replica["state"] != "ready", not replica["alive"]))
    return {
        **{key: best[key] for key in ("alive", "state", "cause", *PLACE) if key in best},
        "silent_s": max(replica["silent_s"] for replica in replicas),
        "num_rebuilds": sum(replica["num_rebuilds"] for replica in replicas),
    }


def merged_stats(replicas: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of `StageEngine.get_stats`: of several, the sums of counts and the means of fractions; words are the first's."""
    if len(replicas) == 1:
        return replicas[0]
    merged: dict[str, Any] = {}
    for stats in replicas:
        merged = {**stats, **merged}
    for key, value in merged.items():
        values = [stats[key] for stats in replicas if key in stats]
        if type(value) is int:
            merged[key] = sum(values)
        elif type(value) is float:
            merged[key] = sum(values) / len(values)
    return {**merged, "replicas": list(replicas)}
