"""The tensors of one step of a language model, made from its chunks. Knows no weights, no queue and no sampling.

Legend: N tokens of the step, B sequences, R of them that sample.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.layers.attention.base import AttentionMetadata
from vllm_omni.layers.token_inputs import InputRows, TokenInputs
from vllm_omni.utils.device import CopyFence, host_buffer
from vllm_omni.worker.ar.kv_pool import KVPool

NO_TABLE: list[int] = []


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a language model computes in one step."""

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64, or [3, N] in a step with sequences that have positions of their own
    attention: AttentionMetadata
    input_rows: InputRows | None  # what joins or replaces embeddings
    sampling_rows: Tensor  # [R] int64, the tokens whose states give logits, in their order
    samples_first_rows: bool = False  # whether these are known to be the first R tokens

    @classmethod
    def of(cls, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs], pool: KVPool) -> StepBatch:
        """From chunks of any lengths. inputs: by sequence id, of the tokens of its chunk, where they are more than
        ids.

        For attention each token of a draft is a sequence of its own, so that it is computed as in a step of its own,
        and so are the pads behind a prompt, which see the prompt and not each other.
        """
        spans = [(chunk, span) for chunk in chunks for span in _spans(chunk)]
        metadata = AttentionMetadata.of(
            slots=[slot for chunk in chunks for slot in pool.slots(chunk.sequence, chunk.start, chunk.end)],
            query_starts=[0, *accumulate(span.num_tokens for _, span in spans)],
            context_lens=[span.context_len for _, span in spans],
            block_tables=[chunk.sequence.block_table for chunk, _ in spans],
            block_size=pool.block_size,
            device=pool.device,
            query_only=[index for index, (_, span) in enumerate(spans) if span.is_query_only],
        )
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        has_own = _has_own_positions(inputs)
        return cls(
            token_ids=_tensor(token_ids, pool.device),
            positions=_own_positions(chunks, inputs, pool.device) if has_own else _tensor(positions, pool.device),
            attention=metadata,
            input_rows=_input_rows(chunks, inputs) if inputs else None,
            sampling_rows=_tensor(_sampling_rows(chunks), pool.device),
        )


class DecodeBatch:
    """The batch of steps in which every sequence computes one token and perhaps a draft, in buffers that are made once
    and filled in place.

    A step gets views of the smallest bucket that holds its tokens, a row each; without buckets, of exactly as many
    rows. Padding rows between the last token and the end of the bucket write to the pool's scratch block and read only
    that.
    What a step got is overwritten by the next one.
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        max_num_seqs: int,
        max_num_blocks: int,
        bucket_sizes: Many[int] = (),
        input_size: int | None = None,
    ) -> None:
        """max_num_seqs: rows of the largest step. max_num_blocks: the most blocks of one sequence. bucket_sizes:
        ascending, the last at least max_num_seqs. input_size: the width of the InputRows that every token of a step has
        which `fills_buffers`; None: they have none.
        """
        assert not bucket_sizes or (pool.scratch_block is not None and bucket_sizes[-1] >= max_num_seqs)
        self._pool = pool
        self._bucket_sizes = tuple(bucket_sizes)
        num_rows = self._bucket_sizes[-1] if bucket_sizes else max_num_seqs
        # rows: token ids, positions, slots, context lengths, and which row of the step before chose the token
        columns = host_buffer(5, num_rows, device=pool.device)
        block_table = host_buffer(num_rows, max_num_blocks, device=pool.device)
        self._columns, self._block_table = columns.numpy(), block_table.numpy()  # written through these
        self._row_numbers = np.arange(num_rows)
        self._host = (columns, block_table)
        self._on_device = (columns.to(pool.device), block_table.to(pool.device))  # the same tensors on a CPU
        self._fence = CopyFence(pool.device)
        self._every_row = torch.arange(num_rows + 1, dtype=torch.int64, device=pool.device)
        # Which table each row holds, and how much of it: a table only grows, or another list takes its place.
        self._tables: list[tuple[list[int], int]] = [(NO_TABLE, 0)] * num_rows
        self._padding_table = [] if pool.scratch_block is None else [pool.scratch_block]
        self._num_stale = 0  # rows of the block table, from the first on, that the device does not have as they are
        self._input_rows = None if input_size is None else self._make_input_rows(num_rows, input_size)

    def fits(self, chunks: Many[Chunk]) -> bool:
        """Whether every chunk is one known token and no pad, and all of them with their drafts have a row."""
        num_drafted = 0
        for chunk in chunks:
            num_drafted += len(chunk.draft)
            if chunk.end - chunk.start - len(chunk.draft) != 1 or chunk.sequence.num_pads:
                return False
        return len(chunks) + num_drafted <= self._columns.shape[1]

    def fills_buffers(self, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs]) -> bool:
        """Whether nothing of a step that `fits` stands outside the buffers, which alone a graph can read."""
        if self._input_rows is None:
            return not inputs
        found = [inputs.get(chunk.sequence.sequence_id) for chunk in chunks]
        return all(
            its is not None and its.positions is None and its.rows is not None and not chunk.draft
            for its, chunk in zip(found, chunks, strict=True)
        )

    def fill(self, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs]) -> StepBatch:
        """As `StepBatch.of`. Behind the blocks of a sequence its row of the block table holds any valid numbers."""
        num_rows = sum([chunk.end - chunk.start for chunk in chunks])
        size = self._bucket_size(num_rows)
        columns, attention = self._filled(chunks, num_rows, size)
        is_everyone = all(chunk.samples for chunk in chunks)
        has_own = _has_own_positions(inputs)
        return StepBatch(
            token_ids=columns[0, :size],
            positions=_own_positions(chunks, inputs, self._pool.device, size) if has_own else columns[1, :size],
            attention=attention,
            input_rows=self._joined_rows(chunks, inputs, size) if inputs else None,
            sampling_rows=self._every_row[:num_rows]
            if is_everyone
            else _tensor(_sampling_rows(chunks), self._pool.device),
            samples_first_rows=is_everyone,
        )

    def fill_next(self, chunks: Many[Chunk], goes_on: Many[bool], sources: Many[int], chosen: Tensor) -> StepBatch:
        """The step after that of these chunks, whose tokens are on the device alone: `chosen`, of each chunk at its
        source. Those that do not go on become padding.
        """
        count = len(chunks)
        size = self._bucket_size(count)
        self._fence.wait()
        self._columns[4, :count] = sources
        going = list(zip(chunks, goes_on, strict=True))
        tables = [chunk.sequence.block_table if does else self._padding_table for chunk, does in going]
        positions = [chunk.end if does else 0 for chunk, does in going]
        columns, attention = self._placed(tables, positions, [0] * count, size)
        columns[0, :count] = chosen[columns[4, :count]].clamp_min(0)
        return StepBatch(columns[0, :size], columns[1, :size], attention, None, self._every_row[:count], True)

    def padding(self, size: int) -> StepBatch:
        """A batch of nothing but padding rows, in the places of a bucket's; all of them sample."""
        columns, attention = self._placed([], [], [], size)
        rows = None if self._input_rows is None else self._input_rows.first(size)
        return StepBatch(columns[0, :size], columns[1, :size], attention, rows, self._every_row[:size], True)

    def _filled(self, chunks: Many[Chunk], num_rows: int, size: int) -> tuple[Tensor, AttentionMetadata]:
        """The columns on the device, and what attention is told of their first `size` rows."""
        tables = [chunk.sequence.block_table for chunk in chunks]
        positions = [chunk.start for chunk in chunks]
        if num_rows == len(chunks):
            token_ids = [chunk.sequence.token_ids[chunk.start] for chunk in chunks]
        else:
            tables = [table for table, chunk in zip(tables, chunks, strict=True) for _ in range(chunk.num_tokens)]
            positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
            token_ids = [token for chunk in chunks for token in chunk.token_ids]
        return self._placed(tables, positions, token_ids, size)

    def _placed(
        self, tables: list[list[int]], positions: list[int], token_ids: list[int], size: int
    ) -> tuple[Tensor, AttentionMetadata]:
        """As `_filled`. Of each token: the block table of its sequence, its position, and itself."""
        count = len(tables)
        context_lens = [position + 1 for position in positions]
        self._fence.wait()
        if tables:
            self._fill_places(tables, positions, token_ids)
        if size > count:
            self._fill_padding(count, size)
            context_lens += [1] * (size - count)
        columns, block_table = self._copied()
        return columns, AttentionMetadata(
            slot_mapping=columns[2, :size],
            query_starts=tuple(range(size + 1)),
            context_lens=tuple(context_lens),
            block_table=block_table[:size],
            block_size=self._pool.block_size,
            query_starts_tensor=self._every_row[: size + 1],
            context_lens_tensor=columns[3, :size],
        )

    def _make_input_rows(self, num_rows: int, size: int) -> InputRows:
        rows = torch.zeros(num_rows, size, device=self._pool.device, dtype=self._pool.dtype)
        is_added = torch.ones(num_rows, device=self._pool.device, dtype=torch.bool)
        return InputRows(self._every_row[:num_rows], rows, is_added)

    def _joined_rows(self, chunks: Many[Chunk], inputs: Mapping[int, TokenInputs], size: int) -> InputRows | None:
        joined = _input_rows(chunks, inputs)
        if joined is None or self._input_rows is None or not self.fills_buffers(chunks, inputs):
            return joined
        self._input_rows.rows[: len(chunks)].copy_(joined.rows)
        self._input_rows.is_added[: len(chunks)].copy_(joined.is_added)
        return self._input_rows.first(size)

    def _bucket_size(self, count: int) -> int:
        return self._bucket_sizes[bisect_left(self._bucket_sizes, count)] if self._bucket_sizes else count

    def _fill_places(self, tables: list[list[int]], positions: list[int], token_ids: list[int]) -> None:
        for row, table in enumerate(tables):
            self._fill_table(row, table)
        count, block_size = len(tables), self._pool.block_size
        columns = self._columns[:, :count]
        columns[:2] = token_ids, positions
        blocks = self._block_table[self._row_numbers[:count], columns[1] // block_size]
        columns[2] = blocks * block_size + columns[1] % block_size
        columns[3] = columns[1] + 1

    def _fill_padding(self, start: int, stop: int) -> None:
        assert self._pool.scratch_block is not None
        self._columns[:4, start:stop] = [[0], [0], [self._pool.scratch_block * self._pool.block_size], [1]]
        for row in range(start, stop):
            self._fill_table(row, self._padding_table)

    def _fill_table(self, row: int, table: list[int]) -> None:
        held, length = self._tables[row]
        start = length if held is table else 0
        if start < len(table):
            self._block_table[row, start : len(table)] = table[start:]
            self._tables[row] = (table, len(table))
            self._num_stale = max(self._num_stale, row + 1)

    def _copied(self) -> tuple[Tensor, Tensor]:
        """The buffers where the model computes, up to date."""
        (columns, block_table), (columns_there, block_table_there) = self._host, self._on_device
        if columns_there is not columns:
            columns_there.copy_(columns, non_blocking=True)
            if self._num_stale:
                rows = slice(self._num_stale)
                block_table_there[rows].copy_(block_table[rows], non_blocking=True)
            self._fence.record()
        self._num_stale = 0
        return columns_there, block_table_there


def rope_lengths(chunks: Many[Chunk], num_rows: int, device: torch.device) -> Tensor:
    """[num_rows] int64: of how many tokens each token's sequence was when transformers would compute it, which
    computes a prompt at once and then token by token; ones behind the last chunk.
    """
    lengths = [
        max(chunk.sequence.num_prompt_tokens, position + 1)
        for chunk in chunks
        for position in range(chunk.start, chunk.end)
    ]
    return _tensor(lengths + [1] * (num_rows - len(lengths)), device)


class _Span(NamedTuple):
    """Tokens of a chunk that attend as one sequence."""

    num_tokens: int
    context_len: int
    is_query_only: bool = False


def _spans(chunk: Chunk) -> list[_Span]:
    """Its known tokens, its pads, then each of its draft alone."""
    num_seen = chunk.sequence.num_seen_tokens
    stop = min(chunk.known_end, num_seen)
    known = [_Span(stop - chunk.start, stop)] if chunk.start < stop else []
    first_pad = max(chunk.start, num_seen)
    pads = [_Span(chunk.known_end - first_pad, num_seen, True)] if first_pad < chunk.known_end else []
    return [*known, *pads, *(_Span(1, place + 1) for place in range(chunk.known_end, chunk.end))]


def _sampling_rows(chunks: Many[Chunk]) -> list[int]:
    """The last known token of every chunk that samples, and those of its draft."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.num_tokens
        if chunk.samples:
            rows += range(end - len(chunk.draft) - 1, end)
    return rows


def _has_own_positions(inputs: Mapping[int, TokenInputs]) -> bool:
    """Whether some sequence of the step has positions of its own."""
    return any(its.positions is not None for its in inputs.values())


def _own_positions(
    chunks: Many[Chunk], inputs: Mapping[int, TokenInputs], device: torch.device, num_rows: int = 0
) -> Tensor:
    """[3, N], in a step with sequences that have positions of their own; zeros up to num_rows."""
    found = [inputs.get(chunk.sequence.sequence_id) for chunk in chunks]
    parts = [
        torch.arange(chunk.start, chunk.end, device=device).expand(3, -1)
        if its is None or its.positions is None
        else its.positions
        for chunk, its in zip(chunks, found, strict=True)
    ]
    num_padding = num_rows - sum(chunk.num_tokens for chunk in chunks)
    if num_padding > 0:
        parts.append(torch.zeros(3, num_padding, dtype=torch.int64, device=device))
    return torch.cat(parts, dim=1)


def _input_rows(chunks: Many[Chunk], inputs: Mapping[int, TokenInputs]) -> InputRows | None:
    parts: list[tuple[int, InputRows]] = []
    start = 0
    for chunk in chunks:
        found = inputs.get(chunk.sequence.sequence_id)
        if found is not None and found.rows is not None:
            parts.append((start, found.rows))
        start += chunk.num_tokens
    return InputRows.join(parts)


def _tensor(values: Many[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
