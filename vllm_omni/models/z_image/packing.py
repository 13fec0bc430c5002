"""Rows of different sizes packed into one tensor of tokens, for image transformers with two-by-two patches.

Rows of equal geometry stand together as a `Group`, so that what is per row works on dense [rows, length, D] views of
the packed [N, D] tensor. Knows no weights.

Legend: R rows, N packed tokens of all rows, L tokens of a row (image, padded to 32, then text), D width, A modulation
width, C latent channels, T text tokens padded to 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PATCH = 2
SEQUENCE_MULTIPLE = 32
Rows = Tensor | Sequence[Tensor]


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

    def per_row(self) -> list[Tensor]:
        """[L, D] views, in packed order."""
        return list(self.hidden.split(list(self.packings[0])))

    def with_rows(self, rows: Sequence[Tensor]) -> Tokens:
        """The same batch with other hidden states: [L, D] each, in packed order."""
        return replace(self, hidden=torch.cat(list(rows)))

    def select(self, rows: Sequence[int]) -> Tokens:
        """The chosen packed rows (ascending) as tokens of their own."""
        chosen, groups, start = set(rows), [], 0
        for group in self.groups:
            count = sum(row in chosen for row in range(group.rows.start, group.rows.stop))
            if count:
                groups.append(replace(group, rows=slice(start, start + count)))
                start += count
        hidden = self.per_row()
        return Tokens(
            torch.cat([hidden[row] for row in rows]),
            self.condition[list(rows)],
            tuple(groups),
            tuple(self.order[row] for row in rows),
        )


def padded(length: int) -> int:
    """Rounded up to what the model was trained to see."""
    return -(-length // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


def grouped(geometries: Sequence[tuple[int, int, int]]) -> tuple[Group, ...]:
    """Runs of equal (latent height, latent width, text tokens) as groups."""
    groups: list[Group] = []
    for row, (height, width, num_text) in enumerate(geometries):
        geometry = (height // PATCH, width // PATCH, num_text)
        if groups and (groups[-1].height, groups[-1].width, groups[-1].num_text) == geometry:
            groups[-1] = replace(groups[-1], rows=slice(groups[-1].rows.start, row + 1))
        else:
            groups.append(Group(slice(row, row + 1), *geometry))
    return tuple(groups)


def patchified(latents: Tensor) -> Tensor:
    """[rows, C, h, w] -> [rows, h / 2 * w / 2, 4 C], channels innermost."""
    rows, channels, height, width = latents.shape
    patches = latents.view(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(rows, -1, PATCH * PATCH * channels)


def unpatchified(patches: Tensor, height: int, width: int) -> Tensor:
    """[rows, height * width, 4 C] -> [rows, C, 2 height, 2 width]."""
    grid = patches.unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, (height, width))
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height * PATCH, width * PATCH)


def dense(rows: Rows, chosen: Sequence[int]) -> Tensor:
    """The chosen rows, all of one shape, stacked; a tensor of all rows is taken as it is when every row is chosen."""
    if isinstance(rows, Tensor):
        return rows if list(chosen) == list(range(len(rows))) else rows[list(chosen)]
    return torch.stack([rows[row] for row in chosen])
