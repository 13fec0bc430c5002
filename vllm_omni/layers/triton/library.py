"""Where Triton's kernels can run. Knows none of them."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.utils.device import is_cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels may compute on these: on CUDA, of one dtype, each contiguous in its last axis, and not while
    torch traces or differentiates, since it does not see what they compute.
    """
    if not is_cuda(x.device) or x.dtype not in DTYPES or torch.compiler.is_compiling() or not can_compile():
        return False
    tensors = (x, *(other for other in others if other is not None))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(tensor.dtype == x.dtype and tensor.stride(-1) == 1 for tensor in tensors)


@functools.cache
def can_compile() -> bool:
    """Whether Triton is here, and all that it needs at run time."""
    return find_spec("triton") is not None and missing_to_compile() is None


def missing_to_compile() -> str | None:
    """What Triton needs at run time and would not find; None where it has all."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang, or CC)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the headers of Python (Python.h)"
    return None


def power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()
