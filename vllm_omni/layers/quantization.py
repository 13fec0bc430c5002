"""What weights in int8 are and what a product with them is, in torch; the kernels in csrc/cpu/quantized.h do the same.

A weight has one scale for each output, symmetric about zero. A product quantises each row of its input by the largest
value of that row, sums whole numbers exactly, and applies both scales last: a row's result depends on no other row.

Legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127  # int8 without -128, so that both signs reach as far
MAX_INPUTS = 2**17  # sums of more products could overflow int32
EXACT_INPUTS = 1024  # sums of so many products are whole numbers of float32
OUTPUTS_STEP, INPUTS_STEP = 32, 4  # shapes are multiples of these: what the kernels take; torch alone is slow at int8
PART = 2**20  # numbers of a weight that are worked on at once: what a cache holds


def fits(outputs: int, inputs: int) -> bool:
    """Whether a weight of this shape may be held in int8."""
    return outputs % OUTPUTS_STEP == 0 and inputs % INPUTS_STEP == 0 and inputs <= MAX_INPUTS


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] of any floating dtype -> int8 [N, K] and scales [N] float32."""
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(PART // max(weight.shape[1], 1), 1)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        numbers[part], scales[part] = _quantize(weight[part])
    return numbers, scales


def multiply_quantized(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., K]; weight: int8 [N, K]; scales: [N] -> [..., N] in x's dtype."""
    rows, row_scales = _quantize(x.reshape(-1, x.shape[-1]))
    product = _exact_product(rows, weight) * (row_scales[:, None] * scales)
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).unflatten(0, x.shape[:-1]) if x.dim() != 2 else product.to(x.dtype)


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """int8 or float8 [N, K] and scales [N] -> float32 [N, K]."""
    return numbers.float() * scales[:, None]


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> int8 [M, K] and scales [M] float32; a row that holds NaN or infinity has the scale NaN."""
    rows = rows.float()
    largest = rows.abs().amax(dim=-1)
    largest = largest + (largest - largest)
    inverse = torch.full_like(largest, LARGEST) / largest  # a number over a tensor would be rounded twice
    inverse = inverse.nan_to_num(0.0, 0.0, 0.0)  # rows of nothing but the smallest numbers are zeros
    return (rows * inverse[:, None]).round().nan_to_num(0.0).to(torch.int8), largest / LARGEST


def _exact_product(rows: Tensor, weight: Tensor) -> Tensor:
    """int8 [M, K] and [N, K] -> their products [M, N], rounded once, to float32."""
    inputs = rows.shape[1]
    total = torch.zeros(len(rows), len(weight), dtype=torch.int32, device=rows.device)
    step = max(PART // EXACT_INPUTS, 1)
    for first in range(0, inputs, EXACT_INPUTS):
        x = rows[:, first : first + EXACT_INPUTS].float()
        for start in range(0, len(weight), step):
            part = weight[start : start + step, first : first + EXACT_INPUTS].float()
            total[:, start : start + step] += F.linear(x, part).to(torch.int32)
    return total.float()
