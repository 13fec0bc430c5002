"""What tokens of a sequence are besides their ids: positions of their own, and rows that replace or join their
embeddings. A sequence without TokenInputs is its token ids alone.

Legend: n tokens of a sequence, N of a step, M of them with rows, E width of the embeddings.
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
    rows: Tensor  # [M, E]
    is_added: Tensor  # [M] bool, whether a row joins the token's embedding (else it stands in its place)

    def merge(self, embeddings: Tensor) -> Tensor:
        """embeddings: [N, E] -> [N, E]."""
        own = torch.where(self.is_added[:, None], embeddings[self.indices], 0)
        return embeddings.index_copy(0, self.indices, own + self.rows.to(embeddings.dtype))

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
class TokenInputs:
    """What some consecutive tokens of a sequence are besides their ids."""

    positions: Tensor | None  # [3, n] int64: time, height, width; None: those of plain text
    rows: InputRows | None = None  # their indices count from the first of these tokens


def continued_positions(positions: Tensor, delta: int, start: int, stop: int) -> Tensor:
    """positions: [3, T] of the first T tokens; a later token t stands at t + delta on every axis -> [3, stop -
    start].
    """
    length = positions.shape[1]
    known = positions[:, start : min(stop, length)]
    if stop <= length:
        return known
    later = torch.arange(max(start, length), stop, device=positions.device) + delta
    return torch.cat([known, later.expand(3, -1)], dim=1)
