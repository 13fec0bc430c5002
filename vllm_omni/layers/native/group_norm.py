"""Group normalisation of pictures, as the kernels take it."""

from __future__ import annotations

from torch import Tensor

from vllm_omni.layers.native.diffusion import glue_threads
from vllm_omni.layers.native.library import Kernels, pointer
from vllm_omni.layers.native.structures import GroupNormStruct

WIDTH = 16  # csrc/cpu/simd.h: channels of a vector, at most


def fits(x: Tensor) -> bool:
    """x: [R, C, h, w]. Whether the kernels take so many channels, as they lie."""
    return x.ndim == 4 and x.shape[1] % WIDTH == 0 and x.permute(0, 2, 3, 1).is_contiguous()


def group_norm(
    functions: Kernels, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, epsilon: float, *, activated: bool
) -> Tensor:
    """x: [R, C, h, w], its channels last in memory -> the same shape and memory. activated: SiLU of it."""
    pictures, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)
    out = x.new_empty(pixels.shape)
    shape = GroupNormStruct(pictures, height * width, channels, num_groups, epsilon, activated)
    functions.group_norm(pointer(pixels), shape, pointer(weight), pointer(bias), pointer(out), glue_threads(x))
    return out.permute(0, 3, 1, 2)
