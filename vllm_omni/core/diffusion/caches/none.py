"""No step cache: every step is computed whole."""

from __future__ import annotations

from torch import Tensor

from vllm_omni.core.diffusion.caches.base import StepCache


class NoCache(StepCache):
    """`num_lead_blocks` 0 tells the runner not to split the step at all."""

    reference = "every step is computed"
    default_threshold = 0.0
    num_lead_blocks = 0

    def reuse(self, lead_residual: Tensor) -> Tensor | None:
        return None

    def update(self, lead_residual: Tensor, rest_residual: Tensor) -> None:
        return None

    @property
    def num_bytes(self) -> int:
        return 0
