"""What the kernels find in logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.native.library import kernels, pointer, threads_for
from vllm_omni.utils.device import is_cpu


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
