"""TaylorSeer: between computed steps, the residual of the whole stack of blocks is extrapolated from the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_omni.core.diffusion.caches.base import RowCache, StepCachePolicy, tensor_bytes
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number


@dataclass(frozen=True, slots=True)
class TaylorSeerOptions:
    """The keys beside `policy: taylorseer`."""

    interval: int = 5  # every so many steps one is computed; 1 computes all
    warmup_steps: int = 3  # the first so many steps are computed
    order: int = 1  # of the polynomial through the last `order + 1` computed steps; 0 replays

    def __post_init__(self) -> None:
        for name, low in (("interval", 1), ("warmup_steps", 1), ("order", 0)):
            check_number(name, getattr(self, name), low, integer=True, raises=ConfigError)


class TaylorSeer(StepCachePolicy):
    """Computes the steps s < warmup_steps and those with (s - warmup_steps - 1) divisible by the interval."""

    reference = "arXiv 2503.06923; schedule and defaults of diffusers' TaylorSeerCacheConfig"
    options_type = TaylorSeerOptions

    def __init__(self, options: TaylorSeerOptions) -> None:
        self._options = options

    def new_row(self, num_steps: int) -> TaylorSeerRow:
        return TaylorSeerRow(self._options)

    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        return (self._options.order + 1) * num_tokens * token_bytes


class TaylorSeerRow(RowCache):
    """Newton's form of the polynomial p through the computed steps s0 > s1 > ..:
    p(s) = d0 + d1 (s - s0) + d2 (s - s0)(s - s1) + .., with dj the divided difference over s0 .. sj.
    """

    kept = ("_steps", "_differences")

    def __init__(self, options: TaylorSeerOptions) -> None:
        self._options = options
        self._steps: list[int] = []  # s0, s1, ..
        self._differences: list[Tensor] = []  # d0, d1, .., [L, D] each

    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        if not self._steps:  # a branch that begins late
            return False
        since_warmup = step - self._options.warmup_steps
        return since_warmup >= 0 and (since_warmup - 1) % self._options.interval != 0

    def predict(self, step: int) -> Tensor:
        total, factor = self._differences[0], 1
        for difference, known_step in zip(self._differences[1:], self._steps, strict=False):
            factor *= step - known_step
            total = total + factor * difference
        return total

    def update(self, step: int, signal: Tensor | None, measured: Sequence[float], rest_residual: Tensor) -> None:
        fresh = [rest_residual]
        for known_step, old in zip(self._steps[: self._options.order], self._differences, strict=False):
            fresh.append((fresh[-1] - old) / (step - known_step))
        self._differences = fresh
        self._steps = [step, *self._steps][: len(fresh)]

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(*self._differences)
