"""Matrix multiplication with weights, several published projections as one, and embeddings that are also a head. Knows
no model and no checkpoint file; how a weight lies in memory is `packing`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.native.packed import NativePacking
from vllm_omni.layers.packing import Packing, find_packing, multiply_with_onednn
from vllm_omni.utils.device import multiplies_with_onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], weight: [out, in], one dtype -> [..., out]. Only for inference: it has no gradient."""
    if multiplies_with_onednn(weight.device, weight.dtype):
        return multiply_with_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer whose weight can be packed for inference; until then it is as torch's own."""

    packing: Packing | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packing is None:
            return super().forward(x)
        return self.packing.multiply(x, self.weight, self.bias)

    def pack(self) -> None:
        """Lays the weight out as it is multiplied, where that helps; the published layout is gone."""
        if self.packing is None:
            weight = self.weight.detach()
            self.packing = find_packing(weight)
            if self.packing is not None:
                self.weight = nn.Parameter(self.packing.pack(weight), requires_grad=False)


class Embedding(nn.Embedding):
    """Embeddings, which may be the weight of the head, too."""

    packing: NativePacking | None = None

    def __init__(self, num_embeddings: int, embedding_dim: int, *, is_head: bool) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.is_head = is_head

    def forward(self, token_ids: Tensor) -> Tensor:
        return super().forward(token_ids) if self.packing is None else self.packing.rows(self.weight, token_ids)

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] -> [R, V], of the embeddings of a head."""
        assert self.is_head, "these embeddings are no head"
        if self.packing is None:
            return linear(states, self.weight)
        return self.packing.multiply(states, self.weight, None)

    def pack(self) -> None:
        """As a Linear's where they are a head, in a layout whose rows can still be read: oneDNN's would need a copy."""
        if self.is_head and self.packing is None:
            weight = self.weight.detach()
            self.packing = NativePacking.find(weight)
            if self.packing is not None:
                self.weight = nn.Parameter(self.packing.pack(weight), requires_grad=False)


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
    """Packs every layer of this file in a module whose weights are loaded and will not change."""
    for part in module.modules():
        if isinstance(part, Linear | Embedding):
            part.pack()
