"""What the kernels find in logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.native.library import kernels, pointer, threads_for
from vllm_omni.utils.device import is_cpu

MOST_TOP = 256  # that are kept in order while a row is read; of more a sort is as fast


def find_largest(logits: Tensor) -> Tensor | None:
    """logits: [R, V] -> [R] int64: the first of the largest of each row, -1 for a row that is not all finite; None
    where there is no kernel for them.
    """
    functions = kernels(logits.dtype)
    if functions is None or not is_cpu(logits.device):
        return None
    logits = logits.contiguous()
    found = torch.empty(len(logits), dtype=torch.int64)
    functions.find_largest(pointer(logits), *logits.shape, pointer(found), threads_for(logits.numel()))
    return found


def find_top(logits: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """logits: [R, V] -> values [R, count] float32 and places [R, count] int64: the largest of each row in falling
    order, of equal ones the first first; None where there is no kernel for them. What a row lacks is -infinity; a row
    with NaN gives some of its numbers.
    """
    functions = kernels(logits.dtype)
    if functions is None or count > MOST_TOP or not is_cpu(logits.device):
        return None
    logits = logits.contiguous()
    values = torch.empty(len(logits), count)
    places = torch.empty(len(logits), count, dtype=torch.int64)
    found = (pointer(values), pointer(places))
    functions.find_top(pointer(logits), *logits.shape, count, *found, threads_for(logits.numel()))
    return values, places
