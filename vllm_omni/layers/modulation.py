"""Norms, scales, shifts and gates between the layers of a diffusion transformer, where every sample has its own. On a
CPU and on CUDA each is one pass of the package's own kernels, elsewhere some of torch's. Knows no model.

Legend: R samples, L tokens of each, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.layers.native import diffusion
from vllm_omni.layers.native.library import Kernels, kernels_for
from vllm_omni.layers.native.structures import NormStruct
from vllm_omni.layers.norm import LayerNorm, RMSNorm
from vllm_omni.layers.triton import glue, library

Norm = RMSNorm | LayerNorm


def modulated(x: Tensor, norm: Norm, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """norm(x) * (1 + scale) + shift. x: [R, L, D]; scale, shift: [R, 1, D] -> [R, L, D]."""
    if library.takes(x, scale, shift):
        return glue.norm_rows(x, norm.rows(), scale, shift)[0]
    functions = _functions(x, scale, shift)
    if functions is None:
        return plain_modulated(x, norm, scale, shift)
    x = x.contiguous()
    out = torch.empty_like(x)
    diffusion.modulate(functions, x, norm_struct_of(norm), scale, shift, out)
    return out


def gated_sum(x: Tensor, update: Tensor, gate: Tensor | None = None, norm: Norm | None = None) -> Tensor:
    """x + gate * norm(update). x, update: [R, L, D]; gate: [R, 1, D] -> [R, L, D]."""
    if library.takes(x, update, gate):
        return glue.gate_rows(x, update, gate, None if norm is None else norm.rows())
    functions = _functions(x, update, gate)
    if functions is None:
        return plain_gated_sum(x, update, gate, norm)
    x, update = x.contiguous(), update.contiguous()
    out = torch.empty_like(x)
    diffusion.add_gated(functions, x, update, None if norm is None else norm_struct_of(norm), gate, out)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. [..., 2 D], gates first -> [..., D]."""
    if library.takes(gate_up):
        return glue.swiglu_rows(gate_up)
    functions = _functions(gate_up)
    if functions is None:
        return plain_swiglu(gate_up)
    return diffusion.gate(functions, gate_up.contiguous())


def gelu(x: Tensor) -> Tensor:
    """By its tanh: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    functions = _functions(x)
    return F.gelu(x, approximate="tanh") if functions is None else diffusion.gelu(functions, x.contiguous())


def plain_modulated(x: Tensor, norm: Norm, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    normed: Tensor = norm(x)
    if scale is not None:
        normed = torch.addcmul(normed if shift is None else shift, normed, scale if shift is None else 1 + scale)
    return normed


def plain_gated_sum(x: Tensor, update: Tensor, gate: Tensor | None, norm: Norm | None) -> Tensor:
    if norm is not None:
        update = norm(update)
    return x + update if gate is None else torch.addcmul(x, gate, update)


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _functions(x: Tensor, *others: Tensor | None) -> Kernels | None:
    """None where they do not take what is given."""
    is_fit = all(other is None or other.dtype == x.dtype for other in others)
    return kernels_for(x, *others) if is_fit else None


def norm_struct_of(norm: Norm) -> NormStruct:
    """Pointers into the norm, which must outlive it."""
    weight = norm.weight if isinstance(norm, RMSNorm) else None
    return diffusion.norm_struct(weight, norm.eps, is_centred=weight is None)
