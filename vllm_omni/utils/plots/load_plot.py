"""A picture of a load: how its times are distributed, and when what was asked. Knows numbers, no server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FAILED = "#c0392b"


def draw_load(
    times: Mapping[str, Sequence[float]], ends: Mapping[str, Sequence[tuple[float, float, bool]]], path: Path
) -> None:
    """Writes a PNG. times: what is measured -> seconds of every answer. ends: kind of work -> (when it began, seconds
    from the load's start; how long it took; whether it went well) of every request.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: nothing global is touched
    shares, moments = figure.subplots(1, 2)
    _draw_shares(shares, times)
    _draw_moments(moments, ends)
    canvas.print_png(path)


def _draw_shares(axes: Any, times: Mapping[str, Sequence[float]]) -> None:
    for name, values in times.items():
        ordered = sorted(max(value, 1e-6) for value in values)
        shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
        axes.step([ordered[0], *ordered], [0.0, *shares], where="post", label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("seconds")
    axes.set_ylabel("share of answers within")
    axes.grid(color="#e6e8ec")
    if times:
        axes.legend(loc="best", frameon=False)


def _draw_moments(axes: Any, ends: Mapping[str, Sequence[tuple[float, float, bool]]]) -> None:
    for number, (name, points) in enumerate(ends.items()):
        good = [(began, took) for began, took, is_ok in points if is_ok]
        axes.scatter(*_columns(good), s=14, color=f"C{number % 10}", label=name)
    failed = [(began, took) for points in ends.values() for began, took, is_ok in points if not is_ok]
    if failed:
        axes.scatter(*_columns(failed), s=24, marker="x", color=FAILED, label="failed")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("request began (s)")
    axes.set_ylabel("seconds to its end")
    axes.grid(color="#e6e8ec")
    axes.legend(loc="best", frameon=False)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
