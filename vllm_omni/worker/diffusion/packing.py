"""Work on rows of different lengths that lie packed in one tensor of tokens, without padding between them.

Neighbouring rows of equal length form a span, so that what is per row works on dense [rows, L, D] views. Knows no
model.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Where neighbouring rows of equal length lie in the packed tensor."""

    rows: slice  # of the packed rows
    tokens: slice  # of the packed tensor
    num_rows: int
    length: int  # tokens of each row
    rope: Tensor  # [length, head_dim / 2, 2] cosines and sines, float32


def per_span(function: Callable[..., Tensor], spans: Sequence[Span], *packed: Tensor, row: Tensor) -> Tensor:
    """Applies `function(*[rows, L, D], [rows, 1, D])` to every span: packed [N, D] in, packed [N, D] out."""
    parts = []
    for span in spans:
        views = [tensor[span.tokens].unflatten(0, (span.num_rows, span.length)) for tensor in packed]
        parts.append(function(*views, row[span.rows, None]).flatten(0, 1))
    return joined(parts)


def joined(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor, without a copy where there is one alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
