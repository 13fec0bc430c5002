"""Rows of different sizes packed into one tensor of tokens, for image transformers with two-by-two patches.

Rows of equal geometry stand together as a `Group`, so that what is per row works on dense [rows, length, D] views of
the packed [N, D] tensor. Knows no weights.

Legend: R rows, N packed tokens of all rows, L tokens of a row (image, padded to 32, then text), D width, A modulation
width, C latent channels, T text tokens padded to 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_omni.worker.diffusion.packing import chosen_runs, runs
from vllm_omni.worker.diffusion.patches import PATCH

SEQUENCE_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows of one geometry: `height` x `width` patches and `num_text` text tokens (padded) each."""

    rows: slice
    height: int
    width: int
    num_text: int

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_image(self) -> int:
        return padded(self.height * self.width)

    @property
    def length(self) -> int:
        return self.num_image + self.num_text


@dataclass(frozen=True, slots=True)
class Tokens:
    """All rows between two blocks."""

    hidden: Tensor  # [N, D]
    condition: Tensor  # [R, A], from the timestep
    groups: tuple[Group, ...]
    order: tuple[int, ...]  # packed row -> the caller's row

    @property
    def packings(self) -> tuple[Sequence[int], ...]:
        """Of all tokens, and of what comes from the timestep."""
        lengths = [group.length for group in self.groups for _ in range(group.num_rows)]
        return lengths, [1] * len(lengths)

    def content(self) -> tuple[Any, list[Tensor]]:
        """See TokenBatch."""
        groups = [[x.rows.start, x.rows.stop, x.height, x.width, x.num_text] for x in self.groups]
        return [groups, list(self.order)], [self.hidden, self.condition]

    @classmethod
    def of_content(cls, plain: Any, tensors: Sequence[Tensor]) -> Tokens:
        """What `content` gave, on another rank."""
        groups, order = plain
        hidden, condition = tensors
        return cls(hidden, condition, tuple(Group(slice(a, b), *sizes) for a, b, *sizes in groups), tuple(order))

    def per_row(self) -> list[Tensor]:
        """[L, D] views, in packed order."""
        return list(self.hidden.split(list(self.packings[0])))

    def with_rows(self, rows: Sequence[Tensor]) -> Tokens:
        """The same batch with other hidden states: [L, D] each, in packed order."""
        return replace(self, hidden=torch.cat(list(rows)))

    def select(self, rows: Sequence[int]) -> Tokens:
        """The chosen packed rows (ascending) as tokens of their own."""
        hidden = self.per_row()
        return Tokens(
            torch.cat([hidden[row] for row in rows]),
            self.condition[list(rows)],
            chosen_runs(self.groups, rows),
            tuple(self.order[row] for row in rows),
        )


def padded(length: int) -> int:
    """Rounded up to what the model was trained to see."""
    return -(-length // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def grouped(geometries: Sequence[tuple[int, int, int]]) -> tuple[Group, ...]:
    """Runs of equal (latent height, latent width, text tokens) as groups."""
    patches = [(height // PATCH, width // PATCH, num_text) for height, width, num_text in geometries]
    return tuple(Group(rows, *geometry) for rows, geometry in runs(patches))
