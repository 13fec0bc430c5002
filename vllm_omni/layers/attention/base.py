"""The interface of causal attention for a ragged batch over a paged KV cache.

A backend is made once per step from the AttentionMetadata and then called by every layer. Another backend is another
subclass and a row of the registry. Legend: N tokens of the step, B sequences, H query heads, K key-value heads, D head
size, L tokens of a sequence so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
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


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[num_queries, num_keys] bool: the last query sees every key."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril(num_keys - num_queries)
