"""Rows of different durations packed into one tensor of tokens, for transformers over the frames of a sound.

Rows of equal length stand together as a `Group`, so that what is per row works on dense [rows, length, D] views of
the packed [N, D] tensor. Neighbours that read the same `Text` share one call of cross-attention. Knows no weights.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width, t tokens of a text, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_omni.models.z_image.packing import Span


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """What cross-attention reads: for each layer keys and values, [1, K, t, head_dim] each. The same for every step, so
    it is made once and shared by all rows that read it.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """What one row is given besides its latents. context: [L, D], the part of the embedded input that no step
    changes.
    """

    text: Text
    context: Tensor


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
    """All rows between two blocks.

    hidden: [N, D]; embedding: [R, D] and modulation: [R, 6, D], both from the timestep; texts and num_frames (latent
    frames, before patches): by packed row; order: packed row -> caller's row.
    """

    hidden: Tensor
    embedding: Tensor
    modulation: Tensor
    groups: tuple[Group, ...]
    texts: tuple[Text, ...]
    num_frames: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each packed row."""
        return [group.length for group in self.groups for _ in range(group.num_rows)]

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
            tuple(self.texts[row] for row in chosen),
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

    def readings(self) -> list[tuple[slice, Text]]:
        """(tokens, text) of neighbouring rows with the same text."""
        found: list[tuple[slice, Text]] = []
        start = 0
        for length, text in zip(self.lengths, self.texts, strict=True):
            if found and found[-1][1] is text:
                found[-1] = (slice(found[-1][0].start, start + length), text)
            else:
                found.append((slice(start, start + length), text))
            start += length
        return found


def grouped(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Runs of equal lengths as groups."""
    groups: list[Group] = []
    for row, length in enumerate(lengths):
        if groups and groups[-1].length == length:
            groups[-1] = replace(groups[-1], rows=slice(groups[-1].rows.start, row + 1))
        else:
            groups.append(Group(slice(row, row + 1), length))
    return tuple(groups)


def packed_order(lengths: Sequence[int], texts: Sequence[Text]) -> tuple[int, ...]:
    """The rows by length, and within a length by text (in order of first appearance)."""
    first: dict[int, int] = {}
    for text in texts:
        first.setdefault(id(text), len(first))
    return tuple(sorted(range(len(lengths)), key=lambda row: (lengths[row], first[id(texts[row])])))
