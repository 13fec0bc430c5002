"""Weights in the layout of the package's own kernels: packed, multiplied, and looked up by row."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.native.library import Kernels, kernels, pointer
from vllm_omni.layers.native.structures import LinearStruct

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
        if functions is None or weight.device.type != "cpu" or weight.shape[1] % 2:
            return None
        return cls(weight.dtype, functions)

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] -> [out up to a whole panel, in], in place of the weight where its rows fill all panels."""
        outputs, inputs = weight.shape
        rows = -(-outputs // PANEL) * PANEL
        weight = weight.contiguous()
        packed = weight if rows == outputs else weight.new_empty(rows, inputs)
        self._kernels.pack(pointer(weight), outputs, inputs, pointer(packed), torch.get_num_threads())
        return packed

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        """x: [..., in] -> [..., outputs]."""
        inputs = packed.shape[1]
        assert x.shape[-1] == inputs and x.dtype == self._dtype, f"got {list(x.shape)} of {x.dtype}"
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], outputs)
        struct = LinearStruct(pointer(packed), pointer(bias), outputs, inputs)
        self._kernels.multiply(x.data_ptr(), x.numel() // inputs, struct, out.data_ptr(), torch.get_num_threads())
        return out

    def rows(self, packed: Tensor, ids: Tensor) -> Tensor:
        """ids: [N] int64 -> [N, in], rows of the weight as it was."""
        ids = ids.contiguous()
        out = packed.new_empty(len(ids), packed.shape[1])
        self._kernels.unpack_rows(pointer(packed), packed.shape[1], pointer(ids), len(ids), pointer(out), torch.get_num_threads())
        return out
