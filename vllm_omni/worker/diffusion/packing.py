"""Work on rows of different lengths that lie packed in one tensor of tokens, without padding between them.

Neighbouring rows of equal length form a span, so that what is per row works on dense [rows, L, D] views. Knows no
model.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_omni.layers.band import Band
from vllm_omni.layers.banded import banded_attention
from vllm_omni.layers.head_exchange import attention_of_share
from vllm_omni.layers.heads import HeadShape, placed_heads
from vllm_omni.layers.modulation import Norm, gated_sum, modulated
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.shard import WHOLE, Shard

Key = TypeVar("Key")
Run = TypeVar("Run", bound=Any)  # a dataclass with `rows`, a slice
HeadNorms = tuple[RMSNorm, RMSNorm]  # of queries and keys
# Index of a span, its keys and values [rows, H, L, d] -> those that its queries attend to.
Seen = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Span:
    """Where neighbouring rows of equal length lie in the packed tensor."""

    rows: slice  # of the packed rows
    tokens: slice  # of the packed tensor
    num_rows: int
    length: int  # tokens of each row
    rope: Tensor  # [length, head_dim / 2, 2] cosines and sines, float32
    offset: int = 0  # where in a block the first token of a row stands, where attention is to blocks


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


def attended_rows(
    qkv: Tensor,
    spans: Sequence[Span],
    shape: HeadShape,
    norms: HeadNorms | None,
    seen: Seen | None = None,
    sequence: Shard = WHOLE,
    band: Band | None = None,
) -> Tensor:
    """Attention within each row, placed by the spans' ropes. qkv: [N, (H + 2 K) d], which is overwritten -> [N, H d].
    sequence: the share of each row that the spans are, where other ranks have the others. band: what a token sees of
    its row, at the spans' offsets; None: everything.
    """
    assert band is None or (seen is None and sequence.is_whole)
    parts = []
    for index, span in enumerate(spans):
        query, key, value = placed_heads(_dense(qkv, span), shape, norms, span.rope)  # [rows, H, L, d]
        if seen is not None:
            key, value = seen(index, key, value)
        if band is None:
            attended = attention_of_share(query, key, value, sequence)
        else:
            attended = banded_attention(query, key, value, band.at(span.offset))
        parts.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
    return joined(parts)


def runs(items: Sequence[Key]) -> list[tuple[slice, Key]]:
    """Neighbours that are equal: where they stand, and what they are."""
    found: list[tuple[slice, Key]] = []
    for index, item in enumerate(items):
        if found and found[-1][1] == item:
            found[-1] = (slice(found[-1][0].start, index + 1), item)
        else:
            found.append((slice(index, index + 1), item))
    return found


def chosen_runs(groups: Iterable[Run], rows: Sequence[int]) -> tuple[Run, ...]:
    """The groups of the chosen packed rows (ascending), which then stand without gaps."""
    kept, start = [], 0
    for group in groups:
        count = sum(group.rows.start <= row < group.rows.stop for row in rows)
        if count:
            kept.append(replace(group, rows=slice(start, start + count)))
            start += count
    return tuple(kept)


def joined(parts: list[Tensor]) -> Tensor:
    """The parts as one tensor, without a copy where there is one alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dense(packed: Tensor, span: Span) -> Tensor:
    """[N, D] -> [rows, L, D] of a span."""
    return packed[span.tokens].unflatten(0, (span.num_rows, span.length))


def _of(vectors: Tensor | None, span: Span) -> Tensor | None:
    """[R, D] -> [rows, 1, D] of a span."""
    return None if vectors is None else vectors[span.rows, None]
