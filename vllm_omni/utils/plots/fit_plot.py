"""A picture of measured points and the line that was fitted to them. Knows numbers, no step cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

MEASURED, FITTED = "#3b6ea5", "#d9772b"
Points = Sequence[tuple[float, float]]


def draw_fit(points: Points, line: Points, axes: tuple[str, str], title: str, path: Path) -> None:
    """Writes a PNG. points, line: (x, y) each. axes: what x and y are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: nothing global is touched
    plot = figure.subplots()
    plot.scatter([x for x, _ in points], [y for _, y in points], s=14, alpha=0.6, color=MEASURED, label="measured")
    plot.plot([x for x, _ in line], [y for _, y in line], color=FITTED, label="fitted")
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    plot.set_title(title, fontsize=8)
    plot.grid(color="#e6e8ec")
    plot.set_axisbelow(True)
    plot.legend(loc="best", frameon=False)
    canvas.print_png(path)
