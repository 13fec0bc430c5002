"""What weights in float8 (e4m3) are, and a product with them: on CUDA by the units that multiply it, elsewhere in
float32, which is the definition.

A weight has one scale for each output, and a product scales each row of its input by the largest value of that row, so
that a row's result depends on no other row. Sums are rounded to bfloat16.

Legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.layers.triton import glue, library
from vllm_omni.utils.device import is_cuda

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # number of this dtype
STEP = 16  # shapes of weights are multiples of it
MOST = torch.finfo(torch.float32).max


def fits(outputs: int, inputs: int) -> bool:
    """Whether a weight of this shape may be held in float8."""
    return outputs % STEP == 0 and inputs % STEP == 0


def quantize_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] of any floating dtype -> float8 [M, K] and scales [M] float32; what holds NaN or infinity gives a row that
    is not finite.
    """
    if library.takes(rows):
        return glue.quantize_rows(rows, DTYPE)
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, dtype=torch.float32)
    inverse = (LARGEST / largest).clamp(max=MOST)  # of rows of zeros, too
    return (rows * inverse[:, None]).to(DTYPE), largest / LARGEST


def multiply_float8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., K]; weight: float8 [N, K]; scales: [N] -> [..., N] in x's dtype."""
    rows, row_scales = quantize_float8(x.reshape(-1, x.shape[-1]))
    product = _product if is_cuda(x.device) and len(rows) else plain_product
    multiplied = product(rows, row_scales, weight, scales).to(x.dtype)
    if bias is not None:
        multiplied = multiplied + bias
    return multiplied.unflatten(0, x.shape[:-1]) if x.dim() != 2 else multiplied


def plain_product(rows: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """float8 [M, K] and [N, K] with their scales [M] and [N] -> bfloat16 [M, N]."""
    return (F.linear(rows.float(), weight.float()) * (row_scales[:, None] * scales)).bfloat16()


def _product(rows: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return torch._scaled_mm(
        rows.contiguous(),
        weight.t(),
        scale_a=row_scales[:, None],
        scale_b=scales[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # what float8 rounds away is far more
    )
