"""A picture of what step caches cost and keep: distance over computed blocks, each policy in its colour, the front as a
line. Knows figures, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PLAIN = "fewer steps"
COLOURS = ("#3b6ea5", "#d9772b", "#4d9a6a", "#a5486f", "#7a6cb0")


def draw_front(variants: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Writes a PNG. variants: `figures` of every variant; that of all steps, at distance 0, is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: nothing global is touched
    axes = figure.subplots()
    most = max(variant["blocks"] for variant in variants)
    shown = [variant for variant in variants if variant["distance"] > 0]
    policies = [PLAIN, *dict.fromkeys(variant["policy"] for variant in shown if variant["policy"])]
    for policy in policies:
        own = [variant for variant in shown if (variant["policy"] or PLAIN) == policy]
        points = sorted((variant["blocks"] / most, variant["distance"]) for variant in own)
        colour = "#555555" if policy == PLAIN else COLOURS[(policies.index(policy) - 1) % len(COLOURS)]
        marker, line = ("s", "--") if policy == PLAIN else ("o", ":")
        x, y = [x for x, _ in points], [y for _, y in points]
        axes.plot(x, y, color=colour, label=policy, linewidth=1, marker=marker, linestyle=line)
    front = sorted((variant["blocks"] / most, variant["distance"]) for variant in shown)
    best = [point for index, point in enumerate(front) if all(y > point[1] for _, y in front[:index])]
    axes.plot([x for x, _ in best], [y for _, y in best], color="#d0d4da", linewidth=6, zorder=0, label="front")
    axes.set_yscale("log")
    axes.set_xlabel("blocks computed, of all")
    axes.set_ylabel("distance of the latents (relative L2)")
    axes.set_title(title)
    axes.grid(color="#e6e8ec")
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=False)
    canvas.print_png(path)
