"""A picture of when the stages of one request waited, worked and gave their first rows. Knows numbers, no stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROW_INCHES = 0.45
WAITED, WORKED, FIRST = "#d0d4da", "#3b6ea5", "#d9772b"

BESIDE: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}


def draw_timeline(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG. metrics: as of a final OmniOutput, the times in seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(timeline_figure(metrics)).print_png(path)


def timeline_figure(metrics: Mapping[str, Mapping[str, Any]]) -> Any:
    """A matplotlib Figure: one row a stage, the first on top; a bar for its work, a thin pale one for its time in the
    queue before it, a mark where its first rows came. Time runs from the request's admission.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + ROW_INCHES * len(metrics)), dpi=100, layout="constrained")
    axes = figure.subplots()  # no pyplot: nothing global is touched
    end_s = max((_end_s(did) for did in metrics.values() if _has_run(did)), default=0.0) or 1.0
    for row, did in enumerate(metrics.values()):
        if _has_run(did):
            _draw_stage(axes, row, did, end_s)
        else:
            axes.annotate("skipped", (0, row), xytext=(5, 0), textcoords="offset points", va="center", color="gray")
    axes.set_yticks(range(len(metrics)), list(metrics))
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlim(0, end_s * 1.4)  # room for the words behind the last bar
    axes.set_xlabel("time since admission (s)")
    axes.grid(axis="x", color="#e6e8ec")
    axes.set_axisbelow(True)
    _draw_legend(figure, any("first_rows_s" in did for did in metrics.values()))
    return figure


def _has_run(did: Mapping[str, Any]) -> bool:
    return "ran_s" in did


def _end_s(did: Mapping[str, Any]) -> float:
    return float(did["started_s"] + did["ran_s"])


def _draw_stage(axes: Any, row: int, did: Mapping[str, Any], end_s: float) -> None:
    start = did["started_s"]
    axes.barh(row, did["queued_s"], left=start - did["queued_s"], height=0.2, color=WAITED)
    axes.barh(row, max(did["ran_s"], end_s / 500), left=start, height=0.6, color=WORKED)  # a moment shows too
    words = _duration(did["ran_s"])
    if "first_rows_s" in did:
        first = did["first_rows_s"]
        axes.plot([start + first], [row], marker="D", color=FIRST, markeredgecolor="white", clip_on=False)
        words += f", first rows after {_duration(first)}"
    axes.annotate(words, (_end_s(did), row), **BESIDE)


def _draw_legend(figure: Any, has_first_rows: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=WAITED, label="queued"), Patch(color=WORKED, label="ran")]
    if has_first_rows:
        handles.append(Line2D([], [], marker="D", color=FIRST, linestyle="none", label="first rows"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
