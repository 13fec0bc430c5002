"""Normalisation over the last axis, root-mean-square rounded as transformers rounds it; on CUDA in one pass. Knows no
model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.triton import glue, library


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis.

    Computed in float32 and rounded to the input's dtype before the weight is applied, so that low-precision results
    equal those of transformers bit for bit (`torch.nn.functional.rms_norm` rounds once, after the weight).
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim], any float dtype -> the same shape and dtype."""
        return glue.norm_rows(x, self.rows())[0] if library.takes(x, self.weight) else self.plain(x)

    def after_sum(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """x + update, and its norm; both [N, dim]."""
        if library.takes(x, update, self.weight):
            normed, total = glue.norm_rows(x, self.rows(), update=update)
            return total, normed
        total = x + update
        return total, self(total)

    def rows(self) -> glue.RowNorm:
        """What a kernel is given of it."""
        return glue.RowNorm(self.weight, self.eps)

    def plain(self, x: Tensor) -> Tensor:
        """By operations of torch."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


class LayerNorm(nn.Module):
    """`(x - mean(x)) / std(x)` over the last axis, without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim], any float dtype -> the same shape and dtype."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def rows(self) -> glue.RowNorm:
        """What a kernel is given of it."""
        return glue.RowNorm(None, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"
