"""Rows of any sizes and lengths in one tensor of tokens: the batch of the Wan transformer between two blocks.

Rows of equal geometry stand together. The first frame of a row may be given, and is then modulated as at timestep 0.
Knows no weights.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_omni.worker.diffusion.cross_attention import CrossAttentionKV, reading_runs
from vllm_omni.worker.diffusion.packing import Span, chosen_runs, runs


@dataclass(frozen=True, slots=True, order=True)
class Geometry:
    """What two rows must share to be computed as one dense tensor: tokens along each axis."""

    frames: int
    height: int
    width: int
    is_continued: bool  # whether the first frame is given

    @property
    def frame_length(self) -> int:
        return self.height * self.width

    @property
    def length(self) -> int:
        return self.frames * self.frame_length


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows of one geometry."""

    rows: slice  # of the packed rows
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Films:
    """All rows between two blocks: a TokenBatch."""

    hidden: Tensor  # [N, D]
    times: Tensor  # [R, 7, D], of the timesteps: shifts, scales and gates of a block (6), and the embedding
    resting: Tensor | None  # [1, 7, D], of timestep 0, where a first frame is given
    groups: tuple[Group, ...]
    reads: tuple[CrossAttentionKV, ...]  # by packed row
    order: tuple[int, ...]  # packed row -> caller's row

    @property
    def geometries(self) -> list[Geometry]:
        """Of each packed row."""
        return [group.geometry for group in self.groups for _ in range(group.rows.stop - group.rows.start)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each packed row."""
        return [geometry.length for geometry in self.geometries]

    @property
    def packings(self) -> tuple[Sequence[int], ...]:
        """One, of all tokens: what comes from the timestep is made in `embed`."""
        return (self.lengths,)

    def per_row(self) -> list[Tensor]:
        """[L, D] views, in packed order."""
        return list(self.hidden.split(self.lengths))

    def with_rows(self, rows: Sequence[Tensor]) -> Films:
        """The same batch with other hidden states: [L, D] each, in packed order."""
        return replace(self, hidden=torch.cat(list(rows)))

    def select(self, rows: Sequence[int]) -> Films:
        """The chosen packed rows (ascending) as a batch of their own."""
        hidden, chosen = self.per_row(), list(rows)
        return replace(
            self,
            hidden=torch.cat([hidden[row] for row in chosen]),
            times=self.times[chosen],
            groups=chosen_runs(self.groups, chosen),
            reads=tuple(self.reads[row] for row in chosen),
            order=tuple(self.order[row] for row in chosen),
        )

    def spans(self, rope: Callable[[Geometry], Tensor]) -> list[Span]:
        """Where the groups lie. rope: geometry -> [L, head_dim / 2, 2]."""
        spans, start = [], 0
        for group in self.groups:
            count, length = group.rows.stop - group.rows.start, group.geometry.length
            tokens = slice(start, start + count * length)
            spans.append(Span(group.rows, tokens, count, length, rope(group.geometry)))
            start = tokens.stop
        return spans

    def vectors(self) -> Tensor:
        """[R, 7, D], or [R + 1, 7, D] with those of timestep 0 behind: the rows of `modulated_spans`."""
        return self.times if self.resting is None else torch.cat([self.times, self.resting])

    def modulated_spans(self, spans: Sequence[Span]) -> list[Span]:
        """Those of `spans`, a first frame that is given apart from what follows it."""
        resting, apart = len(self.times), list[Span]()
        for group, span in zip(self.groups, spans, strict=True):
            if not group.geometry.is_continued:
                apart.append(span)
                continue
            first = group.geometry.frame_length
            for index in range(span.num_rows):
                start, row = span.tokens.start + index * span.length, span.rows.start + index
                middle, stop = start + first, start + span.length
                apart.append(Span(slice(resting, resting + 1), slice(start, middle), 1, first, span.rope[:first]))
                apart.append(Span(slice(row, row + 1), slice(middle, stop), 1, stop - middle, span.rope[first:]))
        return [span for span in apart if span.length]

    def reading_runs(self) -> list[tuple[slice, CrossAttentionKV]]:
        return reading_runs(self.lengths, self.reads)


def grouped(geometries: Sequence[Geometry]) -> tuple[Group, ...]:
    """Neighbours of one geometry as groups."""
    return tuple(Group(rows, geometry) for rows, geometry in runs(geometries))
