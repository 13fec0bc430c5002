"""Rows of mel frames of several chunks of speech, packed without padding between them. Knows no weights.

Blocks of frames are counted from frame 0 of the speech, wherever a row starts, so a part of it is cut into the same
blocks as the whole.

Legend: R rows, N packed frames of all rows, T frames of a row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, order=True)
class RowSpan:
    """A row's frames `start` .. `start + num_frames - 1`, counted from the beginning of the speech."""

    start: int
    num_frames: int


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """All rows between two layers: a TokenBatch. Rows of one span are neighbours."""

    hidden: Tensor  # [N, D]
    modulations: Tensor  # [layers, R, 6, D]: shift, scale and gate of attention, then of the feed-forward
    last_modulation: Tensor  # [R, 2, D]: scale and shift behind the last layer
    rows: tuple[RowSpan, ...]
    order: tuple[int, ...]  # packed row -> the caller's row

    @property
    def packings(self) -> tuple[Sequence[int], ...]:
        """No adapter acts on this model."""
        return ()

    def per_row(self) -> list[Tensor]:
        """[T, D] views, in packed order."""
        return list(self.hidden.split([row.num_frames for row in self.rows]))

    def with_rows(self, rows: Sequence[Tensor]) -> Frames:
        """The same batch with other hidden states: [T, D] each, in packed order."""
        return replace(self, hidden=torch.cat(list(rows)))

    def select(self, rows: Sequence[int]) -> Frames:
        """The chosen packed rows (ascending) as a batch of their own."""
        chosen, hidden = list(rows), self.per_row()
        return Frames(
            torch.cat([hidden[row] for row in chosen]),
            self.modulations[:, chosen],
            self.last_modulation[chosen],
            tuple(self.rows[row] for row in chosen),
            tuple(self.order[row] for row in chosen),
        )
