"""TeaCache: how much the residual of all blocks changes is told by how much the first block's modulated input does; the
last residual is replayed while these estimates add up to little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_omni.core.diffusion.caches.base import (
    Fit,
    RowCache,
    StepCachePolicy,
    check_fitted,
    relative_change,
    tensor_bytes,
)
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number

MAX_COEFFICIENTS = 10


@dataclass(frozen=True, slots=True)
class TeaCacheOptions:
    """The keys beside `policy: teacache`."""

    threshold: float = 0.2  # what the estimated changes since the last computed step must stay below; 0 computes all
    coefficients: tuple[float, ...] = ()  # of the polynomial from the input's change to the residual's, highest first
    fitted_on: str = ""  # fingerprint of the model that they belong to
    fitted_steps: int = 0  # of the trajectories that they were fitted on

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0, raises=ConfigError)
        check_fitted("teacache", "coefficients", self.coefficients, self.fitted_on)
        check_number("coefficients: their number", len(self.coefficients), 1, MAX_COEFFICIENTS, raises=ConfigError)
        check_number("fitted_steps", self.fitted_steps, 1, integer=True, raises=ConfigError)


class TeaCache(StepCachePolicy):
    """Replays while the sum of p(d) stays below the threshold, d = mean|m - m_last| / mean|m_last| of the first block's
    modulated input m from one step to the next, p the fitted polynomial. The first and the last step are computed.

    A polynomial says little beyond the changes that it was fitted on, and another number of steps means other changes;
    so it holds for one number alone. Where it falls below zero it counts as zero: no step makes up for another.
    """

    reference = "arXiv 2411.19108, TeaCache4FLUX (thresholds 0.25 to 0.8 there, with that model's own polynomial)"
    options_type = TeaCacheOptions
    signal = "modulated_input"

    def __init__(self, options: TeaCacheOptions) -> None:
        self._options = options
        self.fit = Fit(options.fitted_on, options.fitted_steps)

    def new_row(self, num_steps: int) -> TeaCacheRow:
        return TeaCacheRow(self._options, num_steps)

    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        return 2 * num_tokens * token_bytes  # the last modulated input and the residual


class TeaCacheRow(RowCache):
    """The modulated input of the last step, the residual of the last computed one, the estimates since."""

    kept = ("_input", "_rest", "_total")

    def __init__(self, options: TeaCacheOptions, num_steps: int) -> None:
        self._options = options
        self._last_step = num_steps - 1
        self._input: Tensor | None = None
        self._rest: Tensor | None = None
        self._total = 0.0

    def measure(self, step: int, signal: Tensor | None) -> Tensor | None:
        """d; nothing at the first step."""
        assert signal is not None
        return None if self._input is None else relative_change(signal, self._input)[None]

    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        if not measured or step == self._last_step:
            return False
        return self._total + self._estimate(measured[0]) < self._options.threshold

    def predict(self, step: int) -> Tensor:
        assert self._rest is not None
        return self._rest

    def update(self, step: int, signal: Tensor | None, measured: Sequence[float], rest_residual: Tensor) -> None:
        self._input, self._rest, self._total = signal, rest_residual, 0.0

    def note_reuse(self, step: int, signal: Tensor | None, measured: Sequence[float]) -> None:
        self._input = signal
        self._total += self._estimate(measured[0])

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self._input, self._rest)

    def _estimate(self, change: float) -> float:
        total = 0.0
        for coefficient in self._options.coefficients:
            total = total * change + coefficient
        return total if total > 0 or total != total else 0.0  # NaN, of an input that was zero, is below no threshold
