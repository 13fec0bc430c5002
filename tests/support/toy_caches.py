"""Step-cache policies that use what the shipped ones do not: the modulated input, tail blocks, no signal at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from torch import Tensor

from vllm_omni import registry
from vllm_omni.core.diffusion.caches.base import RowCache, StepCachePolicy, tensor_bytes


@dataclass(frozen=True, slots=True)
class ToyOptions:
    threshold: float = 0.1


class SumPolicy(StepCachePolicy):
    """As TeaCache: replays while the modulated input's relative changes since the last computed step add up to at most
    the threshold.
    """

    reference = "arXiv 2411.19108, without its polynomial"
    options_type = ToyOptions
    signal = "modulated_input"

    def __init__(self, options: ToyOptions) -> None:
        self.threshold = options.threshold

    def new_row(self, num_steps: int) -> RowCache:
        return SumRow(self.threshold)

    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        return 2 * num_tokens * token_bytes


class SumRow(RowCache):
    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.total = 0.0
        self.last: Tensor | None = None
        self.rest: Tensor | None = None

    def measure(self, step: int, signal: Tensor | None) -> Tensor | None:
        assert signal is not None
        if self.last is None:
            return None
        return ((signal - self.last).abs().mean() / self.last.abs().mean())[None]

    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        return bool(measured) and self.total + measured[0] <= self.threshold

    def predict(self, step: int) -> Tensor:
        assert self.rest is not None
        return self.rest

    def update(self, step: int, signal: Tensor | None, measured: Sequence[float], rest_residual: Tensor) -> None:
        self.last, self.rest, self.total = signal, rest_residual, 0.0

    def note_reuse(self, step: int, signal: Tensor | None, measured: Sequence[float]) -> None:
        self.last = signal
        self.total += measured[0]

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.last, self.rest)


class MiddlePolicy(SumPolicy):
    """As DBCache: the first and the last block are always computed, and the first one's residual decides."""

    reference = "cache-dit"
    signal = "lead_residual"
    num_lead_blocks = 1
    num_tail_blocks = 1


class StepwisePolicy(SumPolicy):
    """As MagCache: the step's number decides, nothing is measured. Every second step is replayed."""

    reference = "arXiv 2506.09045, without its magnitudes"
    signal = "none"

    def new_row(self, num_steps: int) -> RowCache:
        return StepwiseRow(self.threshold)


class StepwiseRow(SumRow):
    def measure(self, step: int, signal: Tensor | None) -> Tensor | None:
        assert signal is None
        return None

    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        return step % 2 == 1

    def note_reuse(self, step: int, signal: Tensor | None, measured: Sequence[float]) -> None:
        pass


TOYS = {"toy_sum": "SumPolicy", "toy_middle": "MiddlePolicy", "toy_stepwise": "StepwisePolicy"}


def add_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds their rows until the test is over."""
    for name, policy in TOYS.items():
        monkeypatch.setitem(registry.TABLES["step cache"], name, f"{__name__}:{policy}")
