"""The interface of causal attention for a ragged batch over a paged KV cache.

Another backend is one file and one row of the registry's table "attention": a subclass of PagedAttention that gives
`attend`. It is made once per step from the AttentionMetadata, where it plans what all layers share, and then called by
every layer. It must not read a slot at or behind a sequence's context length (what stands there may be NaN), nor the
block table behind a sequence's blocks, and a row's result must not depend on its batch-mates beyond rounding. The tests
of this folder run over every row of the table. Legend: N tokens of the step, B sequences, H query heads, K key-value
heads, D head size, L tokens of a sequence so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of a step stand. Lengths come twice: as numbers for a backend that plans on the host, and as
    tensors, which keep their place from decode step to decode step, for one whose kernels read them on the device.
    """

    slot_mapping: Tensor  # [N] int64, the pool slot (block * block_size + offset) of each token
    query_starts: tuple[int, ...]  # B + 1 offsets into the N tokens
    context_lens: tuple[int, ...]  # B: tokens of each sequence so far, this step's included
    block_table: Tensor  # [B, >= most blocks] int64; behind a sequence's blocks any valid numbers
    block_size: int
    query_starts_tensor: Tensor  # [B + 1] int64, as query_starts
    context_lens_tensor: Tensor  # [B] int64, as context_lens

    @classmethod
    def of(
        cls,
        *,
        slots: Sequence[int],
        query_starts: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[list[int]],
        block_size: int,
        device: torch.device,
    ) -> AttentionMetadata:
        """From numbers; block tables of any lengths."""
        most = max(map(len, block_tables))
        tables = [table + [0] * (most - len(table)) for table in block_tables]
        return cls(
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            query_starts=tuple(query_starts),
            context_lens=tuple(context_lens),
            block_table=torch.tensor(tables, dtype=torch.int64, device=device),
            block_size=block_size,
            query_starts_tensor=torch.tensor(query_starts, dtype=torch.int64, device=device),
            context_lens_tensor=torch.tensor(context_lens, dtype=torch.int64, device=device),
        )


class PagedAttention(ABC):
    """Attention of one step."""

    def __init__(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor) -> Tensor:
        """Writes this step's keys and values into the pool, then attends.

        query: [N, H, D]; key, value: [N, K, D]; kv_cache: [2, blocks, block_size, K, D] of one layer -> [N, H, D], the
        query's dtype.
        """
        for cache, states in zip(kv_cache, (key, value), strict=True):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, self.metadata.slot_mapping, states)
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
