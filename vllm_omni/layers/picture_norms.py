"""Norms of pictures and films whose channels lie last in memory, by kernels that read them as they lie, where torch
would copy them first (CUDA), or pass over them for each part of a norm and for what follows it (CPU). Knows no model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.native import picture_norms as native
from vllm_omni.layers.native.library import kernels_for
from vllm_omni.layers.triton import glue, library

MAX_CHANNELS = 4096  # of which a kernel holds one pixel
TINY = 1e-24  # beside a mean of squares: what is all zero stays so


class GroupNorm(nn.GroupNorm):
    """As torch's, rounded once at the end as well. activated: SiLU of it, which is rounded alone."""

    activated = False

    @classmethod
    def of(cls, norm: nn.GroupNorm, *, activated: bool = False) -> GroupNorm:
        """With the parameters of another."""
        own = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        own.weight, own.bias, own.activated = norm.weight, norm.bias, activated
        return own

    def forward(self, input: Tensor) -> Tensor:
        """input: [R, C, H, W] -> the same shape, dtype and memory."""
        functions = kernels_for(input, self.weight) if self.affine and native.fits(input, self.weight) else None
        if functions is not None:
            numbers = self.num_groups, self.weight, self.bias, self.eps
            return native.group_norm(functions, input, *numbers, activated=self.activated)
        normed = self._normed(input)
        return F.silu(normed) if self.activated else normed

    def _normed(self, input: Tensor) -> Tensor:
        is_fit = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
        if is_fit and self._is_fit and library.takes(input.permute(0, 2, 3, 1), self.weight, self.bias):
            return glue.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(input)

    @property
    def _is_fit(self) -> bool:
        """Whether the kernels of CUDA take so many channels and groups: powers of two."""
        numbers = (self.num_channels, self.num_groups)
        return self.affine and self.num_channels <= MAX_CHANNELS and all(number.bit_count() == 1 for number in numbers)


class PixelNorm(nn.Module):
    """`x / rms(x) * weight` over the channels of every pixel, and SiLU of it if it is activated."""

    def __init__(self, weight: Tensor, *, activated: bool) -> None:
        """weight: [C]."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        """x: [R, C, ..], of any dtype -> the same shape and dtype."""
        functions = kernels_for(x, self.weight) if native.fits(x, self.weight) else None
        if functions is None:
            return self.plain(x)
        return native.norm_pixels(functions, x, self.weight, TINY, activated=self.activated)

    def plain(self, x: Tensor) -> Tensor:
        """By operations of torch."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + TINY)
        normed = wide * scale * self.weight.float().view(-1, *[1] * (x.ndim - 2))
        return (F.silu(normed) if self.activated else normed).to(x.dtype)


def use_group_norms(module: nn.Module) -> None:
    """Puts a GroupNorm of this file in the place of each of torch's in a loaded module, with its parameters."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                setattr(parent, name, GroupNorm.of(child))
