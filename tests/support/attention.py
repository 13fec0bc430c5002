"""Attention backends as tests on a CPU can have them: Triton's in its interpreter, FlashAttention through functions of
the same signatures that compute by the definition, and one that could be captured.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni import registry
from vllm_omni.layers.attention.base import AttentionMetadata, AttentionUse, PagedAttention
from vllm_omni.layers.attention.flash import FlashAttention, PackageKernel, TorchKernel
from vllm_omni.layers.attention.reference import ReferenceAttention

CPU = torch.device("cpu")
SIZE, HEAD_DIM = 4, 8
USE = AttentionUse(CPU, torch.float32, SIZE, HEAD_DIM)


def by_definition(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    window_size: tuple[int, int],
) -> Tensor:
    """query: [n, H, D]; keys, values: [blocks, block_size, K, D]; int32 numbers, as the kernels demand them."""
    for numbers in (query_starts, lengths, block_table):
        assert numbers.dtype == torch.int32
    left, right = window_size
    assert right == 0, "causal"
    metadata = AttentionMetadata.of(
        slots=[],
        query_starts=query_starts.tolist(),
        context_lens=lengths.tolist(),
        block_tables=block_table.tolist(),
        block_size=keys.shape[1],
        device=query.device,
    )
    window = None if left == -1 else left + 1
    no_states = query.new_empty(0, keys.shape[2], query.shape[2])
    return ReferenceAttention(metadata).attend(query, no_states, no_states, torch.stack([keys, values]), window)


def varlen_attn(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> Tensor:
    """As `torch.nn.attention.varlen.varlen_attn` of torch 2.12 and 2.13."""
    assert num_splits == 1 and enable_gqa == (query.shape[1] != key.shape[2]) and scale is None
    assert max_q == int(cu_seq_q.diff().max()) and max_k >= int(seqused_k.max())
    assert torch.equal(cu_seq_k.diff(), seqused_k)
    return by_definition(query, key, value, cu_seq_q, seqused_k, block_table, window_size)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    """As flash-attn 2.6 to 2.8."""
    assert causal and max_seqlen_q == int(cu_seqlens_q.diff().max()) > 1, "it splits the keys of single tokens"
    lengths = cu_seqlens_k.diff()
    assert max_seqlen_k >= int(lengths.max())
    return by_definition(q, k, v, cu_seqlens_q, lengths, block_table, window_size)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """As flash-attn 2.6 to 2.8."""
    assert causal and num_splits == 1 and q.shape[1] == 1
    starts = torch.arange(len(q) + 1, dtype=torch.int32)
    return by_definition(q[:, 0], k_cache, v_cache, starts, cache_seqlens, block_table, window_size)[:, None]


class FlashByTorch(FlashAttention):
    find_kernel = staticmethod(lambda: TorchKernel(varlen_attn))


class FlashByPackage(FlashAttention):
    find_kernel = staticmethod(lambda: PackageKernel(flash_attn_with_kvcache, flash_attn_varlen_func))


class CapturableAttention(PagedAttention):
    """Single tokens in operations that ask the device for no number, however long the sequences are; chunks as the
    definition has them.
    """

    is_capturable = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None) -> Tensor:
        metadata = self.metadata
        if any(stop - start > 1 for start, stop in pairwise(metadata.query_starts)):
            return ReferenceAttention(metadata).attend(query, key, value, kv_cache, window)
        places = torch.arange(metadata.block_table.shape[1] * metadata.block_size, device=query.device)
        lengths = metadata.context_lens_tensor[:, None]
        is_seen = places < lengths
        if window is not None:
            is_seen = is_seen & (places >= lengths - window)
        states = kv_cache[:, metadata.block_table].flatten(2, 3)  # [2, B, P, K, D]
        keys, values = torch.where(is_seen[None, :, :, None, None], states, 0).transpose(2, 3)
        mask = is_seen[:, None, None]
        return F.scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=mask, enable_gqa=True)[:, :, 0]


STAND_INS: dict[str, type[PagedAttention]] = {
    "flash by torch": FlashByTorch,
    "flash by package": FlashByPackage,
    "capturable": CapturableAttention,
}


def find_backend(name: str) -> type[PagedAttention]:
    """A row of the registry, or a stand-in."""
    found: type[PagedAttention] = STAND_INS.get(name) or registry.resolve("attention", name)
    return found


def backends(use: AttentionUse = USE) -> list[Any]:
    """All of them, as parameters of a test; those that cannot be used so are skipped with their own words."""
    params = [pytest.param(name) for name in STAND_INS]
    for name in registry.names("attention"):
        complaint = find_backend(name).complaint(use)
        marks = [] if complaint is None else [pytest.mark.skip(reason=f"attention {name!r}: {complaint}")]
        params.append(pytest.param(name, marks=marks))
    return params


Shape = tuple[int, int]  # tokens before this step, tokens of this step


class Step:
    """A random ragged step whose earlier keys and values already stand in a pool with shuffled blocks. query_only:
    sequences of which this step's tokens are no part.
    """

    def __init__(
        self,
        shapes: list[Shape],
        num_heads: int,
        num_kv_heads: int,
        seed: int,
        garbage: float = 0.0,
        *,
        size: int = SIZE,
        head_dim: int = HEAD_DIM,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        query_only: Collection[int] = (),
    ) -> None:
        torch.manual_seed(seed)
        self.size, self.device, self.query_only = size, device, frozenset(query_only)
        needed = [-(-(past + new) // size) for past, new in shapes]
        shuffled = torch.randperm(sum(needed) + 2).tolist()
        self.tables = [[shuffled.pop() for _ in range(count)] for count in needed]
        self.shapes = shapes
        num_tokens = sum(new for _, new in shapes)
        self.query = torch.randn(num_tokens, num_heads, head_dim).to(device, dtype)
        self.key, self.value = torch.randn(2, num_tokens, num_kv_heads, head_dim).to(device, dtype)
        self.cache = torch.full((2, sum(needed) + 2, size, num_kv_heads, head_dim), garbage)
        for table, (past, _) in zip(self.tables, shapes, strict=True):
            slots = [table[position // size] * size + position % size for position in range(past)]
            self.cache.flatten(1, 2)[:, slots] = torch.randn(2, past, num_kv_heads, head_dim)
        self.cache = self.cache.to(device, dtype)

    @property
    def metadata(self) -> AttentionMetadata:
        starts = [0]
        for _, new in self.shapes:
            starts.append(starts[-1] + new)
        slots = [
            table[position // self.size] * self.size + position % self.size
            for table, (past, new) in zip(self.tables, self.shapes, strict=True)
            for position in range(past, past + new)
        ]
        return AttentionMetadata.of(
            slots=slots,
            query_starts=starts,
            context_lens=[
                past if index in self.query_only else past + new for index, (past, new) in enumerate(self.shapes)
            ],
            block_tables=self.tables,
            block_size=self.size,
            device=self.device,
            query_only=self.query_only,
        )

    def attend(self, backend: str, window: int | None = None) -> Tensor:
        return find_backend(backend)(self.metadata)(self.query, self.key, self.value, self.cache.clone(), window)

    def alone(self, index: int) -> tuple[Step, slice]:
        """The same sequence as a step of its own, and its rows here."""
        start = sum(new for _, new in self.shapes[:index])
        rows = slice(start, start + self.shapes[index][1])
        step = object.__new__(Step)
        step.size, step.device = self.size, self.device
        step.query_only = frozenset({0} if index in self.query_only else ())
        step.shapes, step.tables, step.cache = [self.shapes[index]], [self.tables[index]], self.cache
        step.query, step.key, step.value = self.query[rows], self.key[rows], self.value[rows]
        return step, rows

    def on(self, device: torch.device, dtype: torch.dtype) -> Step:
        """The same step elsewhere."""
        step = object.__new__(Step)
        step.size, step.device, step.shapes, step.tables = self.size, device, self.shapes, self.tables
        step.query_only = self.query_only
        tensors = (self.query, self.key, self.value, self.cache)
        step.query, step.key, step.value, step.cache = (tensor.to(device, dtype) for tensor in tensors)
        return step
