"""Group normalisation of pictures whose channels lie last in memory: on CUDA by kernels that read them as they lie,
where torch would copy them first. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_omni.layers.triton import glue, library

MAX_CHANNELS = 4096  # of which a kernel holds one pixel


class GroupNorm(nn.GroupNorm):
    """As torch's, rounded once at the end as well."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [R, C, H, W] -> the same shape, dtype and memory."""
        is_fit = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
        if is_fit and self._is_fit and library.takes(input.permute(0, 2, 3, 1), self.weight, self.bias):
            return glue.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(input)

    @property
    def _is_fit(self) -> bool:
        """Whether the kernels take so many channels and groups: powers of two."""
        numbers = (self.num_channels, self.num_groups)
        return self.affine and self.num_channels <= MAX_CHANNELS and all(number.bit_count() == 1 for number in numbers)


def use_group_norms(module: nn.Module) -> None:
    """Puts a GroupNorm of this file in the place of each of torch's in a loaded module, with its parameters."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.GroupNorm:
                norm = GroupNorm(child.num_groups, child.num_channels, child.eps, child.affine, device="meta")
                norm.weight, norm.bias = child.weight, child.bias
                setattr(parent, name, norm)
