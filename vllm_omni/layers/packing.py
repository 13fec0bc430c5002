"""How the weight of a linear layer is laid out for inference on a CPU, and multiplied so. Knows no layer and no model.

On x86 the products are the package's own (csrc/cpu) or oneDNN's: torch's own float32 path leaves a quarter to half of
an AMD CPU unused, and a weight that was packed once is read at the speed of memory (benchmarks/results/README.md). Each
row's result is the same however many rows there are.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.layers import float8, halves
from vllm_omni.layers.float8 import multiply_float8
from vllm_omni.layers.halves import multiply_halves
from vllm_omni.layers.native.library import built_variants
from vllm_omni.layers.native.packed import NativePacking
from vllm_omni.layers.quantization import dequantize, multiply_quantized
from vllm_omni.utils.device import multiplies_in_tiles, multiplies_with_onednn

PACKED_FOR = 16  # rows; a layout of oneDNN that is fast for one row and for many


class Packing(Protocol):
    """A layout."""

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] -> the weight in this layout."""

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """x: [..., in] -> [..., out]."""


class OneDNNPacking:
    """Of oneDNN; torch keeps it to itself."""

    def pack(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
        return packed

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_with_onednn(x, packed, bias)


class RowPacking(Packing, Protocol):
    """A layout whose rows can still be read."""

    def rows(self, packed: Tensor, ids: Tensor) -> Tensor:
        """ids: [N] int64 -> [N, in], rows of the weight as it was."""


class PlainQuantized:
    """Weights in int8 as they are, multiplied by torch, for activations of one dtype."""

    def __init__(self, dtype: torch.dtype, scales: Tensor) -> None:
        self._dtype = dtype
        self._scales = scales

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_quantized(x, packed, self._scales, bias)

    def rows(self, packed: Tensor, ids: Tensor) -> Tensor:
        return dequantize(packed[ids], self._scales[ids]).to(self._dtype)


class Float8Packing:
    """Weights in float8 as they are, for activations of one dtype."""

    def __init__(self, dtype: torch.dtype, scales: Tensor) -> None:
        self._dtype = dtype
        self._scales = scales

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_float8(x, packed, self._scales, bias)

    def rows(self, packed: Tensor, ids: Tensor) -> Tensor:
        numbers = packed.view(torch.uint8)[ids].view(packed.dtype)
        return dequantize(numbers, self._scales[ids]).to(self._dtype)


class PlainHalves:
    """Weights in bfloat16 as they are, multiplied by torch, for activations in float32."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_halves(x, packed, bias)

    def rows(self, packed: Tensor, ids: Tensor) -> Tensor:
        return packed[ids].to(halves.ACTIVATIONS)


def find_quantized_packing(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> RowPacking:
    """For [out, in] of another dtype than the activations: int8 or float8 with the scales [out] float32 of its outputs,
    or bfloat16.
    """
    if scales is None:
        return NativePacking.find(weight, dtype) or PlainHalves()
    if weight.dtype == float8.DTYPE:
        return Float8Packing(dtype, scales)
    return NativePacking.find(weight, dtype, scales) or PlainQuantized(dtype, scales)


def find_packing(weight: Tensor) -> Packing | None:
    """The fastest for a weight; None where torch's own way is. oneDNN multiplies by the tiles of a CPU that has them,
    the package's own kernels only where they are compiled for that.
    """
    wants_tiles = multiplies_in_tiles(weight.device, weight.dtype) and "amx" not in built_variants()
    native = None if wants_tiles else NativePacking.find(weight)
    if native is not None:
        return native
    return OneDNNPacking() if multiplies_with_onednn(weight.device, weight.dtype) else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """By a weight that is not packed. x: [..., in], weight: [out, in], one dtype -> [..., out]. Only for inference: it
    has no gradient.
    """
    if multiplies_with_onednn(weight.device, weight.dtype):
        return multiply_with_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def multiply_with_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., in]; weight: [out, in], packed by oneDNN or not -> [..., out]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
