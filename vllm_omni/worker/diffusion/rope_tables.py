"""Rotary positions along several axes (time, height, width): a table for each geometry of a row, made once and kept.

Knows no model: which positions the tokens of a geometry have is told.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

MAX_TABLES = 64
Key = TypeVar("Key", bound=Hashable)


class RopeTables(Generic[Key]):
    """positions: geometry -> [L, axes] integers; dims: of each axis, even, their sum being the head size."""

    def __init__(self, positions: Callable[[Key], Tensor], dims: Sequence[int], theta: float) -> None:
        self._positions = positions
        self._dims = tuple(dims)
        self._theta = theta
        self._tables: dict[Key, Tensor] = {}

    def of(self, geometry: Key, device: torch.device) -> Tensor:
        """[L, head_dim / 2, 2] float32 cosines and sines of a row's tokens."""
        table = self._tables.get(geometry)
        if table is None or table.device != device:
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            table = turns(self._positions(geometry), self._dims, self._theta).to(device)
            self._tables[geometry] = table
        return table


def turns(positions: Tensor, dims: Sequence[int], theta: float) -> Tensor:
    """positions: [L, axes] -> [L, sum of dims / 2, 2] float32 cosines and sines; the angles are made in float64."""
    angles = [
        positions[:, axis, None].double() / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        for axis, size in enumerate(dims)
    ]
    turned = torch.cat(angles, dim=-1).float()
    return torch.stack([turned.cos(), turned.sin()], dim=-1)


def grid_positions(height: int, width: int) -> Tensor:
    """[height * width, 2]: row and column of each token of a grid."""
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([down, across], dim=-1).flatten(0, 1)
