"""From recorded steps to the numbers of a calibrated step cache, and how well they fit. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_omni.core.diffusion.caches.recording import StepRecord
from vllm_omni.errors import ConfigError

DIGITS = 6  # significant ones that are written
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Fit:
    """What goes into a config, and what a plot shows of it."""

    policy: str
    keys: dict[str, Any]  # of the policy, `fitted_on` left out
    points: Points  # what was measured
    line: Points  # what the numbers say of it, by x
    axes: tuple[str, str]  # what x and y are
    quality: str  # in words


def fit(policy: str, records: Sequence[StepRecord], num_steps: int, degree: int) -> Fit:
    """policy: teacache or magcache. degree: of teacache's polynomial. ConfigError where too little was recorded."""
    if not all(np.isfinite([record.residual_change, record.magnitude_ratio]).all() for record in records):
        raise ConfigError("calibrate: the residuals are not finite; use dtype bfloat16 or float32")
    return _polynomial(records, num_steps, degree) if policy == "teacache" else _ratios(records, num_steps)


def _polynomial(records: Sequence[StepRecord], num_steps: int, degree: int) -> Fit:
    """Least squares of the residual's change over the input's."""
    points = [(r.input_change, r.residual_change) for r in records if r.input_change is not None]
    if len({x for x, _ in points}) <= degree:
        raise ConfigError(
            f"calibrate: got {len(points)} measured steps, expected more than {degree}, the degree of the polynomial;"
            " give more prompts or steps"
        )
    x, y = np.array(points).T
    coefficients = [_rounded(value) for value in np.polyfit(x, y, degree)]
    left = y - np.polyval(coefficients, x)
    explained = 1 - float(left.var() / y.var()) if y.var() > 0 else 1.0
    places = np.linspace(x.min(), x.max(), 200)
    return Fit(
        "teacache",
        {"coefficients": coefficients, "fitted_steps": num_steps},
        points,
        list(zip(places.tolist(), np.polyval(coefficients, places).tolist(), strict=True)),
        ("change of the modulated input", "change of the residual"),
        f"{len(points)} steps, {explained:.1%} of the variance explained, mean error {np.abs(left).mean():.3g}"
        f" of changes of {y.min():.3g} to {y.max():.3g}",
    )


def _ratios(records: Sequence[StepRecord], num_steps: int) -> Fit:
    """The mean of every step; the first one, which has none before it, counts as 1."""
    by_step: dict[int, list[float]] = {}
    for record in records:
        by_step.setdefault(record.step, []).append(record.magnitude_ratio)
    missing = [step for step in range(1, num_steps) if step not in by_step]
    if missing:
        raise ConfigError(
            f"calibrate: nothing was measured of step {missing[0]} of {num_steps}; give whole trajectories"
        )
    ratios = [1.0, *(_rounded(float(np.mean(by_step[step]))) for step in range(1, num_steps))]
    spread = max((float(np.std(values)) for values in by_step.values()), default=0.0)
    return Fit(
        "magcache",
        {"ratios": ratios},
        [(float(record.step), record.magnitude_ratio) for record in records],
        [(float(step), ratio) for step, ratio in enumerate(ratios)],
        ("step", "magnitude of the residual over the step before's"),
        f"{len(records)} steps, ratios {min(ratios):.4g} to {max(ratios):.4g}, standard deviation of a step's at most"
        f" {spread:.2g}",
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
