"""MagCache: from step to step a model's residual changes its magnitude more than its direction, and alike for every
prompt; so known ratios of magnitudes tell when the last residual may be replayed. Nothing is measured at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.core.diffusion.caches.base import Fit, RowCache, StepCachePolicy, check_fitted, tensor_bytes
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number

MAX_RATIOS = 1000


@dataclass(frozen=True, slots=True)
class MagCacheOptions:
    """The keys beside `policy: magcache`."""

    threshold: float = 0.06  # the largest sum of errors since the last computed step; 0 computes all
    max_skips: int = 3  # the most steps in a row that are replayed
    warmup_fraction: float = 0.2  # of the steps, at the beginning, that are all computed
    ratios: tuple[float, ...] = ()  # of each step of the calibration: magnitude of the residual over the step before's
    fitted_on: str = ""  # fingerprint of the model that they belong to

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0, raises=ConfigError)
        check_number("max_skips", self.max_skips, 0, integer=True, raises=ConfigError)
        check_number("warmup_fraction", self.warmup_fraction, 0, 1, raises=ConfigError)
        check_fitted("magcache", "ratios", self.ratios, self.fitted_on)
        check_number("ratios: their number", len(self.ratios), 1, MAX_RATIOS, raises=ConfigError)


class MagCache(StepCachePolicy):
    """Replays while the sum of |1 - product of the ratios since the last computed step| is at most the threshold, and
    at most `max_skips` steps in a row. For another number of steps the nearest ratios are taken.
    """

    reference = "arXiv 2506.09045; rule, defaults and interpolation of diffusers' MagCacheConfig"
    options_type = MagCacheOptions

    def __init__(self, options: MagCacheOptions) -> None:
        self._options = options
        self.fit = Fit(options.fitted_on)

    def new_row(self, num_steps: int) -> MagCacheRow:
        num_first = int(self._options.warmup_fraction * num_steps + 0.5)
        return MagCacheRow(self._options, nearest(self._options.ratios, num_steps), num_first)

    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        return num_tokens * token_bytes


class MagCacheRow(RowCache):
    """The residual of the last computed step, and how the ratios have added up since."""

    kept = ("_rest", "_product", "_error", "_num_skips")

    def __init__(self, options: MagCacheOptions, ratios: Sequence[float], num_first: int) -> None:
        self._options = options
        self._ratios = ratios
        self._num_first = num_first
        self._rest: Tensor | None = None
        self._product, self._error, self._num_skips = 1.0, 0.0, 0

    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        if self._rest is None or step < self._num_first or self._num_skips >= self._options.max_skips:
            return False
        return self._options.threshold > 0 and self._after(step)[1] <= self._options.threshold

    def predict(self, step: int) -> Tensor:
        assert self._rest is not None
        return self._rest

    def update(self, step: int, signal: Tensor | None, measured: Sequence[float], rest_residual: Tensor) -> None:
        self._rest = rest_residual
        self._product, self._error, self._num_skips = 1.0, 0.0, 0

    def note_reuse(self, step: int, signal: Tensor | None, measured: Sequence[float]) -> None:
        self._product, self._error = self._after(step)
        self._num_skips += 1

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self._rest)

    def _after(self, step: int) -> tuple[float, float]:
        """Product of the ratios and sum of the errors, this step included."""
        product = self._product * self._ratios[step]
        return product, self._error + abs(1.0 - product)


def nearest(ratios: Sequence[float], num_steps: int) -> list[float]:
    """As many ratios as there are steps, each that of the nearest place on the way; rounded as the reference does."""
    if num_steps == 1:
        return [ratios[-1]]
    places = torch.arange(num_steps, dtype=torch.float32) * ((len(ratios) - 1) / (num_steps - 1))
    return [ratios[place] for place in places.round().long().tolist()]
