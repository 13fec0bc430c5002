"""Work on rows of different lengths that lie packed in one tensor of tokens, without padding between them.

Neighbouring rows of equal length form a span, so that what is per row works on dense [rows, L, D] views. Knows no
model.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.layers.modulation import Norm, gated_sum, modulated


@dataclass(frozen=True, slots=True)
class Span:
    """Where neighbouring rows of equal length lie in the packed tensor."""

    rows: slice  # of the packed rows
    tokens: slice  # of the packed tensor
    num_rows: int
    length: int  # tokens of each row
    rope: Tensor  # [length, head_dim / 2, 2] cosines and sines, float32


def modulated_rows(
    x: Tensor, norm: Norm, spans: Sequence[Span], scale: Tensor | None, shift: Tensor | None = None
) -> Tensor:
    """norm(x) * (1 + scale) + shift, each row with its own. x: [N, D]; scale, shift: [R, D] -> [N, D]."""
    parts = [modulated(_dense(x, span), norm, _of(scale, span), _of(shift, span)) for span in spans]
    return joined([part.flatten(0, 1) for part in parts])


def gated_rows(
    x: Tensor, update: Tensor, spans: Sequence[Span], gate: Tensor | None, norm: Norm | None = None
) -> Tensor:
    """x + gate * norm(update), each row with its own gate. x, update: [N, D]; gate: [R, D] -> [N, D]."""
    parts = [gated_sum(_dense(x, span), _dense(update, span), _of(gate, span), norm) for span in spans]
    return joined([part.flatten(0, 1) for part in parts])


def joined(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor, without a copy where there is one alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dense(packed: Tensor, span: Span) -> Tensor:
    """[N, D] -> [rows, L, D] of a span."""
    return packed[span.tokens].unflatten(0, (span.num_rows, span.length))


def _of(vectors: Tensor | None, span: Span) -> Tensor | None:
    """[R, D] -> [rows, 1, D] of a span."""
    return None if vectors is None else vectors[span.rows, None]
