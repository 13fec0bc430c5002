"""The contract of a step cache: the memory of one (request, output, branch), asked once per denoising step.

A step runs in two parts: the first `num_lead_blocks` blocks, which are always computed and whose residual (output
minus input) the cache judges by, and the rest, whose residual it may replay. A cache sees one row alone, so that
batch-mates never change a decision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class StepCache(ABC):
    """reference: where the rule comes from. default_threshold: used when the config names none."""

    reference: ClassVar[str]
    default_threshold: ClassVar[float]
    num_lead_blocks: ClassVar[int]

    def __init__(self, threshold: float | None) -> None:
        self.threshold = self.default_threshold if threshold is None else threshold

    @abstractmethod
    def reuse(self, lead_residual: Tensor) -> Tensor | None:
        """lead_residual: [L, D] of this step. The rest's residual [L, D] to replay, or None when the rest must be
        computed.
        """

    @abstractmethod
    def update(self, lead_residual: Tensor, rest_residual: Tensor) -> None:
        """Takes the residuals, [L, D] each, of a step that was computed whole. They are kept, not copied."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """What the kept tensors take."""
