"""The interface of causal attention for a ragged batch over a paged KV cache.

Another backend is one file and one row of the registry's table "attention": a subclass of PagedAttention that gives
`attend`. It is made once per step from the AttentionMetadata, where it plans what all layers share, and then called by
every layer, with the layer's window: a token sees itself and the `window - 1` tokens before it, without one everything
before it. Tokens that are query-only (pads behind a prompt) are no part of their sequence and see all of it (no window
is shorter); unless a backend says that it takes them together, each comes as a sequence of one token. It must not read
a slot at or behind a sequence's context length (what stands there may be NaN), nor a block that is wholly before what
its queries see (another sequence may hold it by now), nor the block table behind a sequence's blocks, and a row's
result must not depend on its batch-mates beyond rounding. The tests of this folder run over every row of the table.
Legend: N tokens of the step, B sequences, H query heads, K key-value heads, D head size, L tokens of a sequence so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vllm_omni.layers.triton import glue, library


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of a step stand. Lengths come twice: as numbers for a backend that plans on the host, and as
    tensors, which keep their place from decode step to decode step, for one whose kernels read them on the device.
    """

    slot_mapping: Tensor  # [N] int64, the pool slot (block * block_size + offset) of each token
    query_starts: tuple[int, ...]  # B + 1 offsets into the N tokens
    context_lens: tuple[int, ...]  # B: tokens of each sequence so far, this step's included unless query-only
    block_table: Tensor  # [B, >= most blocks] int64; behind a sequence's blocks any valid numbers
    block_size: int
    query_starts_tensor: Tensor  # [B + 1] int64, as query_starts
    context_lens_tensor: Tensor  # [B] int64, as context_lens
    query_only: frozenset[int] = frozenset()  # sequences of which this step's tokens are no part, but see all of them

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
        query_only: Iterable[int] = (),
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
            query_only=frozenset(query_only),
        )

    def with_single_queries(self) -> AttentionMetadata:
        """The same with every query-only token as a sequence of its own: a single token sees all of its context."""
        if not self.query_only:
            return self
        starts: list[int] = []
        owners: list[int] = []  # of each new sequence, the old one
        for index, (start, stop) in enumerate(pairwise(self.query_starts)):
            own = range(start, stop) if index in self.query_only else (start,)
            starts += own
            owners += [index] * len(own)
        starts.append(self.query_starts[-1])
        device = self.block_table.device
        picked = torch.tensor(owners, dtype=torch.int64, device=device)
        return AttentionMetadata(
            slot_mapping=self.slot_mapping,
            query_starts=tuple(starts),
            context_lens=tuple(self.context_lens[index] for index in owners),
            block_table=self.block_table[picked],
            block_size=self.block_size,
            query_starts_tensor=torch.tensor(starts, dtype=torch.int64, device=device),
            context_lens_tensor=self.context_lens_tensor[picked],
        )


@dataclass(frozen=True, slots=True)
class AttentionUse:
    """What a backend would be used for."""

    device: torch.device
    dtype: torch.dtype
    block_size: int
    head_dim: int


class PagedAttention(ABC):
    """Attention of one step."""

    runs_layers: ClassVar[bool] = False  # whether whole layers may be run by kernels that attend by themselves
    # Whether a step of single tokens is launched by the shapes of its tensors alone, so that it may be captured in a
    # graph and replayed with other lengths in them.
    is_capturable: ClassVar[bool] = False
    takes_query_only: ClassVar[bool] = False  # whether it attends query-only tokens of a sequence together

    @classmethod
    def complaint(cls, use: AttentionUse) -> str | None:
        """Why it cannot be used so, as "got X, expected Y"; None where it can."""
        return None

    def __init__(self, metadata: AttentionMetadata) -> None:
        self.metadata = metadata if self.takes_query_only else metadata.with_single_queries()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None = None
    ) -> Tensor:
        """Writes this step's keys and values into the pool, then attends.

        query: [N, H, D]; key, value: [N, K, D]; kv_cache: [2, blocks, block_size, K, D] of one layer; window: the
        tokens that each sees, itself among them; None: all before it -> [N, H, D], the query's dtype.
        """
        slots = self.metadata.slot_mapping
        if library.takes(kv_cache, key, value):
            glue.store_rows(kv_cache, slots, key, value)
        else:
            for cache, states in zip(kv_cache, (key, value), strict=True):
                cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, states)
        return self.attend(query, key, value, kv_cache, window)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None) -> Tensor:
        """As `__call__`, with this step's keys and values already in the pool."""

    def gather(self, index: int, kv_cache: Tensor, window: int | None) -> Tensor:
        """The keys and values [2, n, K, D] of the last n of L tokens of one sequence, out of the pool: those that any
        of its queries sees.
        """
        length, size = self.metadata.context_lens[index], self.metadata.block_size
        start, stop = self.metadata.query_starts[index : index + 2]
        first = first_seen(length - (stop - start), window)
        skipped = first // size
        blocks = self.metadata.block_table[index, skipped : -(-length // size)]
        return kv_cache[:, blocks].flatten(1, 2)[:, first - skipped * size : length - skipped * size]


def first_seen(position: int, window: int | None) -> int:
    """The first token that the token at a position sees."""
    return 0 if window is None else max(0, position - window + 1)


def causal_mask(num_queries: int, num_keys: int, device: torch.device, window: int | None = None) -> Tensor:
    """[num_queries, num_keys] bool: the last query stands at the last key, and each sees `window` keys up to its own,
    or all of them.
    """
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return mask if window is None else mask.triu(num_keys - num_queries - window + 1)
