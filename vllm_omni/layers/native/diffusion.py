"""What stands between the products of a diffusion model's layers, as the kernels take it. What is computed is
`layers.modulation`'s and `layers.snake`'s to say.

Legend: R samples, L tokens of each, D width, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.native.library import Kernels, pointer, threads_for
from vllm_omni.layers.native.structures import HeadRowStruct, NormStruct, PerSampleStruct, TokensStruct

GLUE_WORK = 16  # of a number, in multiplications
FILTER_WORK = 64


def modulate(
    functions: Kernels, x: Tensor, norm: NormStruct, scale: Tensor | None, shift: Tensor | None, out: Tensor
) -> None:
    """x, out: [R, L, D]; scale, shift: [R, 1, D]."""
    functions.modulate(
        pointer(x), tokens_struct(x), norm, per_sample(scale), per_sample(shift), pointer(out), glue_threads(x)
    )


def add_gated(
    functions: Kernels, x: Tensor, update: Tensor, norm: NormStruct | None, gate: Tensor | None, out: Tensor
) -> None:
    """x, update, out: [R, L, D]; gate: [R, 1, D]."""
    functions.add_gated(
        pointer(x), pointer(update), tokens_struct(x), norm, per_sample(gate), pointer(out), glue_threads(x)
    )


def place(functions: Kernels, heads: Tensor, row: HeadRowStruct, turns: Tensor | None) -> None:
    """heads: [R, L, all heads * d], in place; turns: [L, d / 2, 2] float32."""
    functions.place(pointer(heads), tokens_struct(heads), row, pointer(turns), glue_threads(heads))


def gate(functions: Kernels, gate_up: Tensor) -> Tensor:
    """[N, 2 D] -> [N, D]."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    functions.gate(pointer(gate_up), out.numel() // width, width, pointer(out), glue_threads(gate_up))
    return out


def gelu(functions: Kernels, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    functions.gelu(pointer(x), x.numel(), pointer(out), glue_threads(x))
    return out


def snake(functions: Kernels, x: Tensor, frequency: Tensor, amplitude: Tensor, *, channels_last: bool) -> Tensor:
    """x: [outer, inner, C] or [outer, C, inner] -> the same; frequency, amplitude: [C]."""
    out = torch.empty_like(x)
    outer, channels, inner = (x.shape[0] * x.shape[1], x.shape[2], 1) if channels_last else x.shape
    sizes = outer, channels, inner, pointer(out), glue_threads(x)
    functions.snake(pointer(x), pointer(frequency), pointer(amplitude), *sizes)
    return out


def filtered_snake(functions: Kernels, x: Tensor, frequency: Tensor, amplitude: Tensor, taps: Tensor) -> Tensor:
    """x: [outer, C, n] -> the same; frequency, amplitude: [C]; taps: [12] float32."""
    out = torch.empty_like(x)
    periodic = pointer(x), pointer(frequency), pointer(amplitude), pointer(taps)
    functions.filtered_snake(*periodic, *x.shape, pointer(out), threads_for(x.numel() * FILTER_WORK))
    return out


def tokens_struct(x: Tensor) -> TokensStruct:
    """x: [R, L, D]."""
    return TokensStruct(*x.shape)


def per_sample(vectors: Tensor | None) -> PerSampleStruct:
    """vectors: [R, 1, D], which must outlive it."""
    if vectors is None:
        return PerSampleStruct(None, 0)
    assert vectors.stride(-1) == 1 or vectors.shape[-1] == 1
    return PerSampleStruct(vectors.data_ptr(), vectors.stride(0))


def norm_struct(weight: Tensor | None, epsilon: float, *, is_centred: bool) -> NormStruct:
    return NormStruct(pointer(weight), epsilon, is_centred)


def glue_threads(x: Tensor) -> int:
    return threads_for(x.numel() * GLUE_WORK)
