"""What tokens of a sequence are besides their ids: positions of their own, and rows that replace or join their
embeddings. A sequence without TokenInputs is its token ids alone.

Legend: n tokens of a sequence, N of a step, M of them with rows, E width of the embeddings, S layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class InputRows:
    """Rows for some of the tokens of a step."""

    indices: Tensor  # [M] int64, the tokens that have a row, each once
    rows: Tensor  # [M, E], or [M, (1 + S) E]: behind the first E what joins the states after each of the first S layers
    is_added: Tensor  # [M] bool, whether a row joins the token's embedding (else it stands in its place)

    def merge(self, embeddings: Tensor) -> Tensor:
        """embeddings: [N, E] -> [N, E]."""
        own = torch.where(self.is_added[:, None], embeddings[self.indices], 0)
        return embeddings.index_copy(0, self.indices, own + self.rows.to(embeddings.dtype))

    def first(self, count: int) -> InputRows:
        """Of the first tokens that have a row, in the same memory."""
        return InputRows(self.indices[:count], self.rows[:count], self.is_added[:count])

    def split(self, width: int) -> tuple[InputRows, DeepRows | None]:
        """width: E -> what the embeddings are, and what joins the states behind layers, where there is such."""
        if self.rows.shape[1] == width:
            return self, None
        first, *deep = self.rows.split(width, dim=1)
        return InputRows(self.indices, first, self.is_added), DeepRows(self.indices, deep)

    @classmethod
    def join(cls, parts: Sequence[tuple[int, InputRows]]) -> InputRows | None:
        """The rows of several sequences as one; each comes with the index of its first token in the step."""
        if not parts:
            return None
        return cls(
            torch.cat([part.indices + start for start, part in parts]),
            torch.cat([part.rows for _, part in parts]),
            torch.cat([part.is_added for _, part in parts]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class DeepRows:
    """Rows that join the states of some tokens behind the first layers (DeepStack, arXiv 2406.04334)."""

    indices: Tensor  # [M] int64, the tokens that have rows, each once
    rows: Sequence[Tensor]  # [M, E] for each of the first S layers

    @property
    def stops(self) -> range:
        """Behind which layers there is something to add, counted from 1."""
        return range(1, len(self.rows) + 1)

    def add(self, layer: int, states: Tensor) -> Tensor:
        """states: [N, E] behind a layer, counted from 1 -> [N, E]."""
        if layer not in self.stops:
            return states
        return states.index_add(0, self.indices, self.rows[layer - 1].to(states.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class TokenInputs:
    """What some consecutive tokens of a sequence are besides their ids."""

    # [3, n]: time, height, width, int64, or float32 where time is not counted in whole numbers; None: as of plain text
    positions: Tensor | None
    rows: InputRows | None = None  # their indices count from the first of these tokens


def continued_positions(positions: Tensor, delta: float, start: int, stop: int) -> Tensor:
    """positions: [3, T] of the first T tokens; a later token t stands at t + delta on every axis -> [3, stop -
    start].
    """
    length = positions.shape[1]
    known = positions[:, start : min(stop, length)]
    if stop <= length:
        return known
    later = torch.arange(max(start, length), stop, device=positions.device) + delta
    return torch.cat([known, later.expand(3, -1)], dim=1)
