"""Latents as tokens: two by two of them make a patch, one token of an image transformer. Knows no weights.

Legend: C latent channels, h, w sides of the latents (even).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PATCH = 2
Rows = Tensor | Sequence[Tensor]


def patchified(latents: Tensor, *, channels_first: bool = False) -> Tensor:
    """[rows, C, h, w] -> [rows, h / 2 * w / 2, 4 C]; within a patch its channels stand innermost, or first."""
    grid = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [rows, C, h / 2, 2, w / 2, 2]
    within = (1, 3, 5) if channels_first else (3, 5, 1)
    return grid.permute(0, 2, 4, *within).flatten(3).flatten(1, 2)


def unpatchified(patches: Tensor, height: int, width: int, *, channels_first: bool = False) -> Tensor:
    """[rows, height * width, 4 C] -> [rows, C, 2 height, 2 width]."""
    sizes = (-1, PATCH, PATCH) if channels_first else (PATCH, PATCH, -1)
    grid = patches.unflatten(2, sizes).unflatten(1, (height, width))
    channel, down, across = (3, 4, 5) if channels_first else (5, 3, 4)
    return grid.permute(0, channel, 1, down, 2, across).flatten(4).flatten(2, 3)


def dense(rows: Rows, chosen: Sequence[int]) -> Tensor:
    """The chosen rows, all of one shape, stacked; a tensor of all rows is taken as it is when every row is chosen."""
    if isinstance(rows, Tensor):
        return rows if list(chosen) == list(range(len(rows))) else rows[list(chosen)]
    return torch.stack([rows[row] for row in chosen])
