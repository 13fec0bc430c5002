"""Attention within samples, as the kernels take it: heads are read where they stand.

Legend: R samples, L tokens that ask, t tokens that are read, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from torch import Tensor

from vllm_omni.layers.band import Band
from vllm_omni.layers.native.library import Kernels, threads_for
from vllm_omni.layers.native.structures import BandStruct, FullShapeStruct, OperandStruct

PANEL = 32  # csrc/cpu/panels.h
MAX_HEAD_DIM, MAX_GROUP = 512, 16  # csrc/cpu/full_attention.h, attention.h


def fits(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel takes heads of this size, and so many queries to a key."""
    return head_dim <= MAX_HEAD_DIM and head_dim % PANEL == 0 and num_heads // num_kv_heads <= MAX_GROUP


def attend_fully(functions: Kernels, query: Tensor, key: Tensor, value: Tensor, band: Band | None) -> Tensor:
    """query: [R, L, H, d]; key, value: [R, t, K, d], each contiguous in its last axis -> [R, L, H d]."""
    samples, length, num_heads, size = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    out = query.new_empty(samples, length, num_heads * size)
    shape = FullShapeStruct(samples, length, num_keys, num_heads, num_kv_heads, size, band_struct(band), size**-0.5)
    threads = threads_for(2 * samples * length * num_keys * num_heads * size)
    functions.attend_fully(shape, operand(query), operand(key), operand(value), out.data_ptr(), threads)
    return out


def band_struct(band: Band | None) -> BandStruct:
    """None: everything."""
    return BandStruct() if band is None else BandStruct(band.block, band.offset, band.back, band.ahead)


def operand(heads: Tensor) -> OperandStruct:
    """heads: [R, t, K, d]."""
    assert heads.stride(-1) == 1 or heads.shape[-1] == 1
    return OperandStruct(heads.data_ptr(), *heads.stride()[:3])
