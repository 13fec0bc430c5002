"""Several published projections as one matrix multiplication. Knows no model and no checkpoint file."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from torch import Tensor, nn


class MergedLinear(nn.Linear):
    """Projections of one input, stacked on the output axis: `parts` maps their published names to their widths, in
    order.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self.parts = dict(parts)

    def rows(self, part: str) -> slice:
        """The rows of the weight (and bias) that one published projection fills."""
        ends = dict(zip(self.parts, accumulate(self.parts.values()), strict=True))
        return slice(ends[part] - self.parts[part], ends[part])

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: [N, in_features] -> one view [N, width] per part."""
        return self(x).split(list(self.parts.values()), dim=-1)
