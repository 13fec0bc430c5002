"""Convolutions of 3 x 3 as the kernels take them: weights as the products of a tile need them, packed.

Legend: R pictures, or frames of a film, C channels, f frames that a result reads, h, w pixels of a side.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_omni.layers.native.library import Kernels, pointer, threads_for
from vllm_omni.layers.native.results import result
from vllm_omni.layers.native.structures import FilterStruct, PicturesStruct

PANEL = 32  # csrc/cpu/panels.h
WIDTH = 16  # csrc/cpu/simd.h: channels of a vector, at most
NUM_WEIGHTS = 9  # of a filter
MAX_WIDE = 2**17  # weights of a pixel up to which tiles are wide: four times as many are packed


class Tile(enum.IntEnum):
    """What is computed at once of a picture, two results a side or, if it is wide, four. In the order of
    csrc/cpu/convolution.h, which has what becomes of numbers and products.
    """

    PLAIN = 0
    DOUBLED = 1  # of a picture that is doubled first
    WIDE = 2

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, *, doubled: bool = False) -> Tile:
        """For a weight [out, in, .., 3, 3]. In bfloat16, which is rounded on the way, wide ones would cost 8 dB."""
        if doubled:
            return cls.DOUBLED
        return cls.WIDE if dtype == torch.float32 and math.prod(shape[:-2]) <= MAX_WIDE else cls.PLAIN

    @property
    def num_products(self) -> int:
        """What is packed in the place of NUM_WEIGHTS."""
        return len(FACTORS[self]) ** 2


# [products of a line, 3]: three weights of a line -> the factors of its products.
FACTORS: dict[Tile, tuple[tuple[float, ...], ...]] = {
    Tile.PLAIN: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    Tile.DOUBLED: ((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    Tile.WIDE: (
        *((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6)),
        *((1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1)),
    ),
}


def fits(outputs: int, inputs: int) -> bool:
    """Whether the kernels take so many channels."""
    return outputs % PANEL == 0 and inputs % WIDTH == 0


def pack(functions: Kernels, weight: Tensor, tile: Tile) -> Tensor:
    """[out, in, f, 3, 3] -> [out / 32, products of a tile, 32, f in], packed."""
    assert tile is not Tile.WIDE or weight.dtype == torch.float32, f"no wide tiles in {weight.dtype}"
    outputs = weight.shape[0]
    turn = weight.new_tensor(FACTORS[tile], dtype=torch.float64)
    factors = torch.einsum("xi, ocfij, yj -> xyofc", turn, weight.double(), turn).to(weight.dtype)
    panels = factors.flatten(0, 1).flatten(2).unflatten(1, (outputs // PANEL, PANEL)).transpose(0, 1).contiguous()
    depth = panels.shape[-1]
    layout = functions.layouts[weight.dtype]
    layout.pack(pointer(panels), panels.numel() // depth, depth, threads_for(panels.numel()))
    return panels


def convolve(
    functions: Kernels, x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, tile: Tile
) -> Tensor:
    """x: [R + f - 1, C, h, w], its channels last in memory -> [R, C', h, w] so, or with both sides doubled. residual:
    of the result's shape and memory, which is added to it.
    """
    frames, (inputs, height, width) = packed.shape[-1] // x.shape[1], x.shape[1:]
    assert x.dtype == packed.dtype and frames * inputs == packed.shape[-1], f"got {list(x.shape)} of {x.dtype}"
    count, outputs = len(x) - frames + 1, packed.shape[0] * PANEL
    scale = 2 if tile is Tile.DOUBLED else 1
    out = result(x, count, height * scale, width * scale, outputs)
    pictures = PicturesStruct(count, height, width, inputs, outputs, frames)
    read = last(x)
    added = None if residual is None else last(residual)
    filters = FilterStruct(pointer(packed), pointer(bias), pointer(added))
    threads = threads_for(out.numel() * inputs)
    functions.convolve(pointer(read), pictures, filters, tile, pointer(out), threads)
    return out.permute(0, 3, 1, 2)


def last(x: Tensor) -> Tensor:
    """[R, C, h, w] -> [R, h, w, C], contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()
