"""Weights in bfloat16 beside activations in float32, for processors that multiply float32 alone: as few bytes as were
published, and the products of float32. What such a product is, in torch; the kernels in csrc/cpu/gemm.h do the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.layers.native.library import kernels

HELD, ACTIVATIONS = torch.bfloat16, torch.float32
OUTPUTS_STEP, INPUTS_STEP = 32, 2  # shapes are multiples of these: what the kernels take


def fits(outputs: int, inputs: int) -> bool:
    """Whether a weight of this shape may be held so."""
    return outputs % OUTPUTS_STEP == 0 and inputs % INPUTS_STEP == 0


def is_fast() -> bool:
    """Whether the kernels multiply them: torch makes a copy in float32 for every product."""
    return kernels(ACTIVATIONS) is not None


def multiply_halves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., K] float32; weight: bfloat16 [N, K] -> [..., N] float32."""
    return F.linear(x, weight.to(x.dtype), bias)
