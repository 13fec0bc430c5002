"""Convolutions of 3 x 3 as the kernels take them: weights as the products of a tile need them, packed.

Legend: R pictures, or frames of a film, C channels, f frames that a result reads, h, w pixels of a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.native.library import Kernels, pointer, threads_for
from vllm_omni.layers.native.results import result
from vllm_omni.layers.native.structures import FilterStruct, PicturesStruct

PANEL = 32  # csrc/cpu/panels.h
WIDTH = 16  # csrc/cpu/simd.h: channels of a vector, at most
NUM_WEIGHTS, NUM_PRODUCTS = 9, 16  # of a filter, and what is packed in their place; 9 where the picture is doubled
# Three weights of a line -> the factors of a tile's products; csrc/cpu/convolution.h has the other two parts.
PLAIN = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
DOUBLED = ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0))


def fits(outputs: int, inputs: int) -> bool:
    """Whether the kernels take so many channels."""
    return outputs % PANEL == 0 and inputs % WIDTH == 0


def pack(functions: Kernels, weight: Tensor, *, doubled: bool) -> Tensor:
    """[out, in, f, 3, 3] -> [out / 32, products of a tile, 32, f in], packed."""
    outputs = weight.shape[0]
    turn = weight.new_tensor(DOUBLED if doubled else PLAIN, dtype=torch.float32)
    factors = torch.einsum("xi, ocfij, yj -> xyofc", turn, weight.float(), turn).to(weight.dtype)
    panels = factors.flatten(0, 1).flatten(2).unflatten(1, (outputs // PANEL, PANEL)).transpose(0, 1).contiguous()
    depth = panels.shape[-1]
    layout = functions.layouts[weight.dtype]
    layout.pack(pointer(panels), panels.numel() // depth, depth, threads_for(panels.numel()))
    return panels


def convolve(
    functions: Kernels, x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, *, doubled: bool
) -> Tensor:
    """x: [R + f - 1, C, h, w], its channels last in memory -> [R, C', h, w] so, or with both sides doubled. residual:
    of the result's shape and memory, which is added to it.
    """
    frames, (inputs, height, width) = packed.shape[-1] // x.shape[1], x.shape[1:]
    assert x.dtype == packed.dtype and frames * inputs == packed.shape[-1], f"got {list(x.shape)} of {x.dtype}"
    count, outputs = len(x) - frames + 1, packed.shape[0] * PANEL
    scale = 2 if doubled else 1
    out = result(x, count, height * scale, width * scale, outputs)
    pictures = PicturesStruct(count, height, width, inputs, outputs, frames)
    read = last(x)
    added = None if residual is None else last(residual)
    filters = FilterStruct(pointer(packed), pointer(bias), pointer(added))
    threads = threads_for(out.numel() * inputs)
    functions.convolve(pointer(read), pictures, filters, doubled, pointer(out), threads)
    return out.permute(0, 3, 1, 2)


def last(x: Tensor) -> Tensor:
    """[R, C, h, w] -> [R, h, w, C], contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()
