"""Matrix multiplication with weights, and several published projections as one. Knows no model and no checkpoint file.

On an x86 CPU the products are oneDNN's: torch's own float32 path leaves more than half of an AMD CPU unused, and
a weight that was packed once is read at the speed of memory (benchmarks/results/README.md). Each row's result is the
same however many rows there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.utils.device import multiplies_with_onednn

PACKED_FOR = 16  # rows; a layout that is fast for one row and for many


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], weight: [out, in], one dtype -> [..., out]. Only for inference: it has no gradient."""
    if multiplies_with_onednn(weight.device, weight.dtype):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer whose weight can be packed for inference; until then it is as torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return _onednn(x, self.weight, self.bias) if self.weight.is_mkldnn else super().forward(x)

    def pack(self) -> None:
        """Lays the weight out as it is multiplied, where that helps; the published layout is freed."""
        weight = self.weight.detach()
        if multiplies_with_onednn(weight.device, weight.dtype) and not weight.is_mkldnn:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
            self.weight = nn.Parameter(packed, requires_grad=False)


class MergedLinear(Linear):
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


def pack_linears(module: nn.Module) -> None:
    """Packs every `Linear` in a module whose weights are loaded and will not change."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.pack()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
