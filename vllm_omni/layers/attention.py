"""Causal attention of a ragged batch over a paged KV cache: one interface, a plain backend that defines the result and
a fast one.

A backend is made once per step from the AttentionMetadata and then called by every layer. Another backend is another
subclass. Legend: N tokens of the step, B sequences, H query heads, K key-value heads, D head size, L tokens of a
sequence so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of a step stand.

    slot_mapping: [N] int64, the pool slot (block * block_size + offset) of each token. query_starts: B + 1 offsets into
    the N tokens. context_lens: per sequence its tokens so far, this step's included. block_table: [B, most blocks]
    int64, padded with 0.
    """

    slot_mapping: Tensor
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_table: Tensor
    block_size: int


class PagedAttention(ABC):
    """Attention of one step. Rows of the query beyond the N tokens of the metadata are padding and give zeros."""

    def __init__(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor) -> Tensor:
        """Writes this step's keys and values into the pool, then attends.

        query: [N, H, D]; key, value: [N, K, D]; kv_cache: [2, blocks, block_size, K, D] of one layer -> [N, H, D], the
        query's dtype.
        """
        slots = self.metadata.slot_mapping
        for cache, states in zip(kv_cache, (key, value), strict=True):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, states[: len(slots)])
        return self.attend(query, key, value, kv_cache)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor) -> Tensor:
        """As `__call__`, with this step's keys and values already in the pool."""

    def gather(self, index: int, kv_cache: Tensor) -> Tensor:
        """The keys and values [2, L, K, D] of one sequence, out of the pool."""
        length = self.metadata.context_lens[index]
        blocks = self.metadata.block_table[index, : -(-length // self.metadata.block_size)]
        return kv_cache[:, blocks].flatten(1, 2)[:, :length]


class ReferenceAttention(PagedAttention):
    """The definition: one sequence after the other, softmax in float32."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        starts = self.metadata.query_starts
        for index, (start, stop) in enumerate(pairwise(starts)):
            queries = query[start:stop].float()  # [q, H, D]
            group = query.shape[1] // key.shape[1]
            keys, values = self.gather(index, kv_cache).float().repeat_interleave(group, dim=2)  # [L, H, D] each
            scores = torch.einsum("qhd,lhd->hql", queries, keys) * query.shape[2] ** -0.5
            scores = scores.masked_fill(~_causal_mask(stop - start, len(keys), query.device), float("-inf"))
            output[start:stop] = torch.einsum("hql,lhd->qhd", scores.softmax(-1), values).to(query.dtype)
        return output


class SDPAAttention(PagedAttention):
    """torch's fused kernels: one call per prompt chunk, and one per group of single-token queries with equally many
    blocks.

    A group is padded to whole blocks, which depends on the sequence alone: batch-mates change a row's result by no more
    than the rounding of torch's kernels.
    """

    def __init__(self, metadata: AttentionMetadata) -> None:
        super().__init__(metadata)
        starts = metadata.query_starts
        lengths = [stop - start for start, stop in pairwise(starts)]
        self._chunks = [index for index, length in enumerate(lengths) if length > 1]
        by_num_blocks: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            if length == 1:
                by_num_blocks.setdefault(-(-metadata.context_lens[index] // metadata.block_size), []).append(index)
        self._groups = [_DecodeGroup.of(metadata, *item) for item in by_num_blocks.items()]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        for index in self._chunks:
            start, stop = self.metadata.query_starts[index : index + 2]
            if stop - start == self.metadata.context_lens[index]:  # a prompt from its first token: nothing to gather
                keys, values, mask = key[start:stop], value[start:stop], None
            else:
                keys, values = self.gather(index, kv_cache)
                mask = _causal_mask(stop - start, len(keys), query.device)
            output[start:stop] = _sdpa(query[None, start:stop], keys[None], values[None], mask)[0]
        for group in self._groups:
            keys, values = group.gather(kv_cache)
            output[group.rows] = _sdpa(query[group.rows, None], keys, values, group.mask[:, None, None])[:, 0]
        return output


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """G single-token queries whose sequences have equally many blocks: the same padded length P."""

    rows: Tensor  # [G] rows of the query
    blocks: Tensor  # [G, blocks]
    mask: Tensor  # [G, P] bool, True where there is a token
    is_vacant: Tensor  # [G, block_size] bool, True where the last block has none

    @classmethod
    def of(cls, metadata: AttentionMetadata, num_blocks: int, members: list[int]) -> _DecodeGroup:
        device = metadata.block_table.device
        lengths = torch.tensor([metadata.context_lens[index] for index in members], device=device)
        mask = torch.arange(num_blocks * metadata.block_size, device=device) < lengths[:, None]
        return cls(
            rows=torch.tensor([metadata.query_starts[index] for index in members], device=device),
            blocks=metadata.block_table[torch.tensor(members, device=device), :num_blocks],
            mask=mask,
            is_vacant=~mask[:, -metadata.block_size :],
        )

    def gather(self, kv_cache: Tensor) -> Tensor:
        """[2, G, P, K, D]. Slots without a token, all in the last block, are zeroed: what stands there may be NaN, and
        0 * NaN is NaN.
        """
        blocks = kv_cache[:, self.blocks]  # [2, G, blocks, block_size, K, D]
        blocks[:, :, -1].masked_fill_(self.is_vacant[None, :, :, None, None], 0)
        return blocks.flatten(2, 3)


def _causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[num_queries, num_keys] bool: the last query sees every key."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril(num_keys - num_queries)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query: [B, q, H, D]; key, value: [B, L, K, D]; without a mask causal from the first token on -> [B, q, H, D]."""
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.transpose(1, 2)
