"""A run as a Chrome trace (chrome://tracing, Perfetto): when each stage waited and worked.

Source: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_omni.entrypoints.server.runs import Run

MICROSECONDS = 1_000_000


def chrome_trace(run: Run) -> dict[str, Any]:
    """Of what is known so far: stages that have ended. Times are microseconds since the request came."""
    metrics = {} if run.output is None else run.output.metrics
    events: list[dict[str, Any]] = [_named("process_name", 0, f"{run.model.name} {run.id}")]
    for row, (stage, values) in enumerate(metrics.items(), start=1):
        events.append(_named("thread_name", row, stage))
        events += _events(stage, row, values)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(stage: str, row: int, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "started_s" not in values:
        return
    started, queued = values["started_s"], values.get("queued_s", 0.0)
    if queued > 0:
        yield _span(f"{stage} waits", row, started - queued, queued, {})
    yield _span(stage, row, started, values.get("ran_s", 0.0), values)
    if "first_rows_s" in values:
        at = started + values["first_rows_s"]
        name = f"{stage}: first rows"
        yield {"name": name, "ph": "i", "s": "t", "pid": 1, "tid": row, "ts": round(at * MICROSECONDS)}


def _span(name: str, row: int, start_s: float, seconds: float, args: Mapping[str, Any]) -> dict[str, Any]:
    times = {"ts": round(start_s * MICROSECONDS), "dur": round(seconds * MICROSECONDS)}
    return {"name": name, "ph": "X", "pid": 1, "tid": row, **times, "args": dict(args)}


def _named(kind: str, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
