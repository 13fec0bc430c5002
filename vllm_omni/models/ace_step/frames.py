"""Rows of different durations packed into one tensor of tokens, for transformers over latent frames of audio.

Rows of equal length stand together as a `Group`, so that what is per row works on dense [rows, length, D] views of
the packed [N, D] tensor. Neighbours that read the same `CrossAttentionKV` share one call of
cross-attention. Knows no weights.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_omni.worker.diffusion.cross_attention import CrossAttentionKV, reading_runs
from vllm_omni.worker.diffusion.packing import Span


@dataclass(frozen=True, slots=True, eq=False)
class RowCondition:
    """What one row is given besides its latents; no step changes it."""

    cross_attention: CrossAttentionKV
    context: Tensor  # [L, D], the part of the embedded input that belongs to source latents and mask


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows of `length` tokens each."""

    rows: slice
    length: int

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class Frames:
    """All rows between two blocks."""

    hidden: Tensor  # [N, D]
    embedding: Tensor  # [R, D], from the timestep
    modulation: Tensor  # [R, 6, D], from the timestep
    groups: tuple[Group, ...]
    cross_attention: tuple[CrossAttentionKV, ...]  # by packed row
    num_frames: tuple[int, ...]  # latent frames of each packed row, before patches
    order: tuple[int, ...]  # packed row -> caller's row

    @property
    def lengths(self) -> list[int]:
        """Tokens of each packed row."""
        return [group.length for group in self.groups for _ in range(group.num_rows)]

    @property
    def packings(self) -> tuple[Sequence[int], ...]:
        """One, of all tokens."""
        return (self.lengths,)

    def per_row(self) -> list[Tensor]:
        """[L, D] views, in packed order."""
        return list(self.hidden.split(self.lengths))

    def with_rows(self, rows: Sequence[Tensor]) -> Frames:
        """The same batch with other hidden states: [L, D] each, in packed order."""
        return replace(self, hidden=torch.cat(list(rows)))

    def select(self, rows: Sequence[int]) -> Frames:
        """The chosen packed rows (ascending) as a batch of their own."""
        lengths, hidden, chosen = self.lengths, self.per_row(), list(rows)
        return Frames(
            torch.cat([hidden[row] for row in chosen]),
            self.embedding[chosen],
            self.modulation[chosen],
            grouped([lengths[row] for row in chosen]),
            tuple(self.cross_attention[row] for row in chosen),
            tuple(self.num_frames[row] for row in chosen),
            tuple(self.order[row] for row in chosen),
        )

    def spans(self, rope: Tensor) -> list[Span]:
        """Where the groups lie. rope: [at least the longest row, head_dim / 2, 2]; every row starts at position 0."""
        spans, start = [], 0
        for group in self.groups:
            stop = start + group.num_rows * group.length
            spans.append(Span(group.rows, slice(start, stop), group.num_rows, group.length, rope[: group.length]))
            start = stop
        return spans

    def cross_attention_spans(self) -> list[tuple[slice, CrossAttentionKV]]:
        """(tokens, what they read) of neighbouring rows that read the same."""
        return reading_runs(self.lengths, self.cross_attention)


def grouped(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Runs of equal lengths as groups."""
    groups: list[Group] = []
    for row, length in enumerate(lengths):
        if groups and groups[-1].length == length:
            groups[-1] = replace(groups[-1], rows=slice(groups[-1].rows.start, row + 1))
        else:
            groups.append(Group(slice(row, row + 1), length))
    return tuple(groups)
