"""Weights in the layout of the package's own kernels: packed, multiplied, and looked up by row."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.native.library import Kernels, kernels, pointer, threads_for
from vllm_omni.layers.native.structures import LinearStruct
from vllm_omni.utils.device import is_cpu

PANEL = 32  # rows of a weight that stand side by side; csrc/cpu/gemm.h


class NativePacking:
    """Of one element type."""

    def __init__(self, dtype: torch.dtype, functions: Kernels) -> None:
        self._dtype = dtype
        self._kernels = functions

    @classmethod
    def find(cls, weight: Tensor) -> NativePacking | None:
        """For a weight [out, in]; None where the kernels do not take it."""
        functions = kernels(weight.dtype)
        outputs, inputs = weight.shape
        if functions is None or not is_cpu(weight.device) or outputs % PANEL or inputs % 2:
            return None
        return cls(weight.dtype, functions)

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] -> the same memory in another order."""
        outputs, inputs = weight.shape
        self._kernels.pack(pointer(weight), outputs, inputs, threads_for(weight.numel()))
        return weight

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """x: [..., in] -> [..., out]."""
        outputs, inputs = packed.shape
        assert x.shape[-1] == inputs and x.dtype == self._dtype, f"got {list(x.shape)} of {x.dtype}"
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs)
        struct = LinearStruct(pointer(packed), pointer(bias), outputs, inputs)
        threads = threads_for(x.numel() * outputs)
        self._kernels.multiply(x.data_ptr(), x.numel() // inputs, struct, out.data_ptr(), threads)
        return out

    def rows(self, packed: Tensor, ids: Tensor) -> Tensor:
        """ids: [N] int64 -> [N, in], rows of the weight as it was."""
        ids = ids.contiguous()
        out = packed.new_empty(len(ids), packed.shape[1])
        self._kernels.unpack_rows(
            pointer(packed), packed.shape[1], pointer(ids), len(ids), pointer(out), threads_for(out.numel())
        )
        return out
