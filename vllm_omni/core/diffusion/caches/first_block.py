"""First-block cache: when the first block changes little from the last computed step, the rest is assumed to
change little too.
"""

from __future__ import annotations

from torch import Tensor

from vllm_omni.core.diffusion.caches.base import StepCache


class FirstBlockCache(StepCache):
    """Replays the rest when mean|r - r_last| / mean|r_last| of the first block's residual r is at most the threshold.

    r_last is of the last *computed* step, so small changes add up until one is computed.
    """

    reference = (
        "ParaAttention first block cache; diffusers FirstBlockCacheConfig (0.05 there, 0.08 to 0.12 in common use)"
    )
    default_threshold = 0.08
    num_lead_blocks = 1

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__(threshold)
        self._lead: Tensor | None = None
        self._rest: Tensor | None = None
        self._scale = 0.0

    def reuse(self, lead_residual: Tensor) -> Tensor | None:
        if self._lead is None or self._scale == 0.0:
            return None
        change = float((lead_residual - self._lead).abs().mean())
        return self._rest if change <= self.threshold * self._scale else None

    def update(self, lead_residual: Tensor, rest_residual: Tensor) -> None:
        self._lead, self._rest = lead_residual, rest_residual
        self._scale = float(lead_residual.abs().mean())

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._lead, self._rest) if t is not None)
