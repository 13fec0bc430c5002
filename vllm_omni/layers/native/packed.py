"""Weights in the layout of the package's own kernels: packed, multiplied, and looked up by row."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.native.library import Kernels, kernels, pointer, threads_for
from vllm_omni.layers.native.structures import LinearStruct
from vllm_omni.layers.quantization import dequantize
from vllm_omni.utils.device import is_cpu

PANEL = 32  # rows of a weight that stand side by side; csrc/cpu/gemm.h
STEP_BYTES = 4  # of a row that stand side by side in a panel


class NativePacking:
    """Of weights beside activations of one element type; of weights in int8, whose scales are given, too."""

    def __init__(self, dtype: torch.dtype, functions: Kernels, scales: Tensor | None = None) -> None:
        self._dtype = dtype
        self._kernels = functions
        self._scales = scales

    @classmethod
    def find(
        cls, weight: Tensor, dtype: torch.dtype | None = None, scales: Tensor | None = None
    ) -> NativePacking | None:
        """For a weight [out, in]; None where the kernels do not take it. dtype: of activations, where the weight is
        int8, and scales: [out] float32.
        """
        dtype = weight.dtype if dtype is None else dtype
        functions = kernels(dtype)
        outputs, inputs = weight.shape
        fits = not outputs % PANEL and not inputs * weight.itemsize % STEP_BYTES
        return cls(dtype, functions, scales) if functions is not None and is_cpu(weight.device) and fits else None

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] -> the same memory in another order."""
        outputs, inputs = weight.shape
        pack = self._kernels.pack if self._scales is None else self._kernels.pack_int8
        pack(pointer(weight), outputs, inputs, threads_for(weight.numel()))
        return weight

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """x: [..., in] -> [..., out]."""
        outputs, inputs = packed.shape
        assert x.shape[-1] == inputs and x.dtype == self._dtype, f"got {list(x.shape)} of {x.dtype}"
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs)
        struct = LinearStruct(pointer(packed), pointer(self._scales), pointer(bias), outputs, inputs)
        threads = threads_for(x.numel() * outputs)
        self._kernels.multiply(x.data_ptr(), x.numel() // inputs, struct, out.data_ptr(), threads)
        return out

    def rows(self, packed: Tensor, ids: Tensor) -> Tensor:
        """ids: [N] int64 -> [N, in], rows of the weight as it was; those of int8 with their scales."""
        ids = ids.contiguous()
        out = packed.new_empty(len(ids), packed.shape[1])
        unpack = self._kernels.unpack_rows if self._scales is None else self._kernels.unpack_rows_int8
        unpack(pointer(packed), packed.shape[1], pointer(ids), len(ids), pointer(out), threads_for(out.numel()))
        return out if self._scales is None else dequantize(out, self._scales[ids]).to(self._dtype)
