"""First-block cache: when the first block changes little from the last computed step, the rest is assumed to
change little too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_omni.core.diffusion.caches.base import RowCache, StepCachePolicy, tensor_bytes
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number


@dataclass(frozen=True, slots=True)
class FirstBlockOptions:
    """The keys beside `policy: first_block`."""

    threshold: float = 0.08  # the largest relative change of the first block's residual that is taken for none

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0, raises=ConfigError)


class FirstBlockCache(StepCachePolicy):
    """Replays the rest when mean|r - r_last| / mean|r_last| of the first block's residual r is at most the threshold.

    r_last is of the last *computed* step, so small changes add up until one is computed.
    """

    reference = (
        "ParaAttention first block cache; diffusers FirstBlockCacheConfig (0.05 there, 0.08 to 0.12 in common use)"
    )
    options_type = FirstBlockOptions
    signal = "lead_residual"
    num_lead_blocks = 1

    def __init__(self, options: FirstBlockOptions) -> None:
        self._threshold = options.threshold

    def new_row(self, num_steps: int) -> FirstBlockRow:
        return FirstBlockRow(self._threshold)

    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        return 2 * num_tokens * token_bytes  # both residuals


class FirstBlockRow(RowCache):
    """The two residuals of the last computed step."""

    kept: ClassVar[tuple[str, ...]] = ("_lead", "_rest", "_scale")

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._lead: Tensor | None = None
        self._rest: Tensor | None = None
        self._scale = 0.0

    def measure(self, step: int, signal: Tensor | None) -> Tensor:
        """mean|r - r_last| (0 at the first step, where it is not read) and mean|r|, which the next steps compare by."""
        assert signal is not None
        scale = signal.abs().mean()
        change = torch.zeros_like(scale) if self._lead is None else (signal - self._lead).abs().mean()
        return torch.stack([change, scale])

    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        return self._scale > 0.0 and measured[0] <= self._threshold * self._scale

    def predict(self, step: int) -> Tensor:
        assert self._rest is not None
        return self._rest

    def update(self, step: int, signal: Tensor | None, measured: Sequence[float], rest_residual: Tensor) -> None:
        self._lead, self._rest, self._scale = signal, rest_residual, measured[1]

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self._lead, self._rest)
