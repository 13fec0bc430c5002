"""Norms of pictures and films, as the kernels take them.

Legend: R pictures or films, C channels, h, w pixels of a side.
"""

from __future__ import annotations

from torch import Tensor

from vllm_omni.layers.native.diffusion import glue_threads
from vllm_omni.layers.native.library import Kernels, pointer
from vllm_omni.layers.native.results import result
from vllm_omni.layers.native.structures import GroupNormStruct

WIDTH = 16  # csrc/cpu/simd.h: channels of a vector, at most


def fits(x: Tensor, weight: Tensor) -> bool:
    """x: [R, C, h, w], of films [R, C, frames, h, w]. Whether the kernels take so many channels, as they lie, and a
    weight [C] beside them.
    """
    is_taken = x.ndim >= 4 and x.shape[1] % WIDTH == 0 and x.dtype == weight.dtype
    return is_taken and x.movedim(1, -1).is_contiguous()


def group_norm(
    functions: Kernels, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, epsilon: float, *, activated: bool
) -> Tensor:
    """x: [R, C, h, w], its channels last in memory -> the same shape and memory. activated: SiLU of it."""
    pictures, channels, height, width = x.shape
    pixels = x.movedim(1, -1)
    out = result(x, *pixels.shape)
    shape = GroupNormStruct(pictures, height * width, channels, num_groups, epsilon, activated)
    functions.group_norm(pointer(pixels), shape, pointer(weight), pointer(bias), pointer(out), glue_threads(x))
    return out.movedim(-1, 1)


def norm_pixels(functions: Kernels, x: Tensor, weight: Tensor, epsilon: float, *, activated: bool) -> Tensor:
    """x: [R, C, ..], its channels last in memory -> the same shape and memory. weight: [C]. activated: SiLU of it."""
    pixels = x.movedim(1, -1)
    out = result(x, *pixels.shape)
    sizes = x.numel() // x.shape[1], x.shape[1], epsilon, activated
    functions.norm_pixels(pointer(pixels), pointer(weight), *sizes, pointer(out), glue_threads(x))
    return out.movedim(-1, 1)
