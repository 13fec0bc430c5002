"""Paged attention as the kernels take it: pages are read in place, nothing is gathered or padded."""

from __future__ import annotations

from torch import Tensor

from vllm_omni.layers.attention.base import AttentionMetadata
from vllm_omni.layers.native.library import Kernels, pointer, threads_for
from vllm_omni.layers.native.structures import CacheStruct, HeadsStruct, StepStruct

MAX_HEAD_DIM, MAX_GROUP = 256, 16  # csrc/cpu/attention.h


def fits(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels take heads of this size, and so many queries to a key."""
    return head_dim <= MAX_HEAD_DIM and num_heads // num_kv_heads <= MAX_GROUP


def step_struct(metadata: AttentionMetadata) -> StepStruct:
    """Where the tokens of a step stand; the tensors must outlive it."""
    table = metadata.block_table
    assert table.stride(1) == 1 or table.shape[1] == 1
    return StepStruct(
        pointer(metadata.slot_mapping),
        pointer(metadata.query_starts_tensor),
        pointer(metadata.context_lens_tensor),
        table.data_ptr(),
        len(metadata.slot_mapping),
        len(metadata.context_lens),
        table.stride(0),
        metadata.block_size,
    )


def attend(
    functions: Kernels, metadata: AttentionMetadata, query: Tensor, kv_cache: Tensor, window: int | None
) -> Tensor:
    """query: [N, H, D]; kv_cache: [2, blocks, block_size, K, D], this step's tokens in it -> [N, H, D]."""
    query = query.contiguous()
    out = query.new_empty(query.shape)
    num_heads, size = query.shape[1:]
    heads = HeadsStruct(num_heads, kv_cache.shape[3], size, window or 0, size**-0.5)
    cache = CacheStruct(pointer(kv_cache[0]), pointer(kv_cache[1]))
    threads = threads_for(sum(metadata.context_lens) * num_heads * size)
    functions.attend(step_struct(metadata), heads, query.data_ptr(), cache, out.data_ptr(), threads)
    return out
