"""Rows of mel frames on a common grid of blocks, for a transformer whose attention sees whole blocks only.

Blocks are counted from frame 0 of the speech, wherever a row starts, so a part of it is cut into the same blocks as
the whole. The blocks of all rows lie in one [B, S, D] tensor; where a row starts or ends within a block, the rest of
the block is padding that nobody attends to. Knows no weights.

Legend: R rows, B blocks of all rows, S frames of a block, N frames of all rows, D width, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowSpan:
    """A row's frames `start` .. `start + num_frames - 1`, counted from the beginning of the speech."""

    start: int
    num_frames: int


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a layer attends to."""

    blocks: Tensor  # [B, W] int64, the blocks that each block sees (its own instead of one that the row does not have)
    mask: Tensor  # [B, 1, 1, W S] bool, the frames in them

    @property
    def is_own_block(self) -> bool:
        return self.blocks.shape[1] == 1


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the frames of all rows lie."""

    rows: tuple[RowSpan, ...]
    size: int  # S
    slots: Tensor  # [N] int64, each frame's place among the B S places
    row_of_block: Tensor  # [B] int64
    positions: Tensor  # [B, S] int64, counted from the beginning of each row's speech
    views: Mapping[tuple[int, int], View]  # by (blocks back, blocks ahead)

    @classmethod
    def of(cls, rows: Sequence[RowSpan], size: int, reaches: set[tuple[int, int]], device: torch.device) -> Layout:
        first = torch.tensor([row.start // size for row in rows])
        last = torch.tensor([(row.start + row.num_frames - 1) // size for row in rows])
        counts = last - first + 1
        row_of_block = torch.arange(len(rows)).repeat_interleave(counts)
        before = (counts.cumsum(0) - counts)[row_of_block]  # blocks of the rows before
        index = torch.arange(len(row_of_block))
        block = index - before + first[row_of_block]
        positions = block[:, None] * size + torch.arange(size)
        start = torch.tensor([row.start for row in rows])[row_of_block, None]
        stop = torch.tensor([row.start + row.num_frames for row in rows])[row_of_block, None]
        is_frame = (positions >= start) & (positions < stop)
        views = {
            (back, ahead): _view(is_frame, row_of_block, torch.arange(-back, ahead + 1), device)
            for back, ahead in reaches
        }
        slots = is_frame.flatten().nonzero()[:, 0].to(device)
        return cls(tuple(rows), size, slots, row_of_block.to(device), positions.to(device), views)

    def placed(self, frames: Tensor) -> Tensor:
        """[N, D] frames of all rows -> [B, S, D], zero between them."""
        blocks = frames.new_zeros(self.row_of_block.shape[0] * self.size, frames.shape[1])
        return blocks.index_copy_(0, self.slots, frames).unflatten(0, (-1, self.size))

    def taken(self, blocks: Tensor) -> list[Tensor]:
        """[B, S, D] -> the frames [num_frames, D] of each row."""
        return list(blocks.flatten(0, 1)[self.slots].split([row.num_frames for row in self.rows]))


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """All rows between two layers."""

    hidden: Tensor  # [B, S, D]
    time: Tensor  # [R, D], of each row's timestep
    rope: Tensor  # [B, S, d / 2, 2] cosines and sines
    layout: Layout
    order: tuple[int, ...]  # packed row -> the caller's row

    @property
    def packings(self) -> tuple[Sequence[int], ...]:
        """None is told: layers see blocks, which are padded."""
        return ()

    def per_row(self) -> list[Tensor]:
        """[num_frames, D], in packed order, which is the caller's."""
        return self.layout.taken(self.hidden)

    def with_rows(self, rows: Sequence[Tensor]) -> Blocks:
        """The same batch with other hidden states: [num_frames, D] each, in packed order."""
        return replace(self, hidden=self.layout.placed(torch.cat(list(rows))))

    def select(self, rows: Sequence[int]) -> Blocks:
        """The chosen packed rows (ascending) as a batch of their own."""
        chosen, hidden = list(rows), self.per_row()
        spans = [self.layout.rows[row] for row in chosen]
        layout = Layout.of(spans, self.layout.size, set(self.layout.views), self.hidden.device)
        is_chosen = torch.isin(self.layout.row_of_block, torch.tensor(chosen, device=self.hidden.device))
        return Blocks(
            layout.placed(torch.cat([hidden[row] for row in chosen])),
            self.time[chosen],
            self.rope[is_chosen],
            layout,
            tuple(self.order[row] for row in chosen),
        )


def _view(is_frame: Tensor, row_of_block: Tensor, offsets: Tensor, device: torch.device) -> View:
    own = torch.arange(len(row_of_block))[:, None]
    wanted = own + offsets
    inside = (wanted >= 0) & (wanted < len(row_of_block))
    wanted = wanted.clamp(0, len(row_of_block) - 1)
    # a stranger's block would do no harm as long as it is finite: masked weights are 0, but 0 * NaN is NaN
    is_own_row = inside & (row_of_block[wanted] == row_of_block[:, None])
    blocks = torch.where(is_own_row, wanted, own)
    mask = is_frame[blocks] & is_own_row[:, :, None]  # [B, W, S]
    return View(blocks.to(device), mask.flatten(1)[:, None, None].to(device))
