"""Weights in the layout of the package's own kernels: packed, multiplied, and looked up by row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vllm_omni.layers.native.library import Kernels, kernels, pointer, threads_for
from vllm_omni.layers.native.results import result
from vllm_omni.layers.native.structures import LinearStruct
from vllm_omni.layers.quantization import dequantize
from vllm_omni.utils.device import is_cpu

Activation = Literal["gelu", "swiglu"]  # GELU by its tanh; SiLU of the first half gates the second
PANEL = 32  # rows of a weight that stand side by side; csrc/cpu/panels.h
STEP_BYTES = 4  # of a row that stand side by side in a panel


class NativePacking:
    """Of weights beside activations of one element type: the same, int8 with scales, or bfloat16 beside float32."""

    def __init__(
        self, dtype: torch.dtype, functions: Kernels, held: torch.dtype | None = None, scales: Tensor | None = None
    ) -> None:
        """dtype: of activations. held: of weights, where it is another one."""
        self._dtype = dtype
        self._kernels = functions
        self._layout = functions.layouts[dtype if held is None else held]
        self._scales = scales

    @classmethod
    def find(
        cls, weight: Tensor, dtype: torch.dtype | None = None, scales: Tensor | None = None
    ) -> NativePacking | None:
        """For a weight [out, in]; None where the kernels do not take it. dtype: of activations, where the weight is of
        another one. scales: [out] float32, of int8.
        """
        dtype = weight.dtype if dtype is None else dtype
        functions = kernels(dtype)
        outputs, inputs = weight.shape
        fits = not outputs % PANEL and not inputs * weight.itemsize % STEP_BYTES
        is_taken = functions is not None and is_cpu(weight.device) and fits and _goes_with(weight.dtype, dtype)
        return cls(dtype, functions, weight.dtype, scales) if functions is not None and is_taken else None

    def pack(self, weight: Tensor) -> Tensor:
        """[out, in] -> the same memory in another order."""
        outputs, inputs = weight.shape
        self._layout.pack(pointer(weight), outputs, inputs, threads_for(weight.numel()))
        return weight

    def multiply(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        activation: Activation | None = None,
        outputs: slice | None = None,
    ) -> Tensor:
        """x: [..., in] -> [..., out], with SwiGLU [..., out / 2]. activation: that follows, as `layers.modulation`
        computes it. outputs: those that are computed, whole panels of them; None: all.
        """
        scales = self._scales
        if outputs is not None:
            packed = packed[outputs]
            bias, scales = (None if part is None else part[outputs] for part in (bias, scales))
        width, inputs = packed.shape
        assert x.shape[-1] == inputs and x.dtype == self._dtype, f"got {list(x.shape)} of {x.dtype}"
        is_gated = activation == "swiglu"
        x = x.contiguous()
        out = result(x, *x.shape[:-1], width // 2 if is_gated else width)
        struct = linear_struct(packed, scales, bias, activation == "gelu")
        threads = threads_for(x.numel() * width)
        self._kernels.multiply(x.data_ptr(), x.numel() // inputs, struct, is_gated, out.data_ptr(), threads)
        return out

    def rows(self, packed: Tensor, ids: Tensor) -> Tensor:
        """ids: [N] int64 -> [N, in] of the activations' dtype, rows of the weight as it was; those of int8 with their
        scales.
        """
        ids = ids.contiguous()
        out = packed.new_empty(len(ids), packed.shape[1])
        threads = threads_for(out.numel())
        self._layout.unpack_rows(pointer(packed), packed.shape[1], pointer(ids), len(ids), pointer(out), threads)
        return (out if self._scales is None else dequantize(out, self._scales[ids])).to(self._dtype)


def can_gate(outputs: int) -> bool:
    """Whether a product [gate, up] of so many outputs is whole panels of each, as the kernels gate them."""
    return outputs % (2 * PANEL) == 0


def linear_struct(packed: Tensor, scales: Tensor | None, bias: Tensor | None, has_gelu: bool = False) -> LinearStruct:
    """Pointers into a packed weight [out, in] and what belongs to it, which must outlive it."""
    is_in_halves = packed.dtype == torch.bfloat16
    return LinearStruct(pointer(packed), pointer(scales), pointer(bias), *packed.shape, is_in_halves, has_gelu)


def _goes_with(held: torch.dtype, activations: torch.dtype) -> bool:
    """Whether the kernels multiply numbers of these types."""
    return held in (activations, torch.int8) or (held == torch.bfloat16 and activations == torch.float32)
