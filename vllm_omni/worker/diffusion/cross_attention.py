"""What packed rows read of a text by cross-attention: keys and values that no step changes, made once per request and
branch, and which neighbours read the same. Knows no weights.

Legend: R rows, K key-value heads, t tokens of a text, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CrossAttentionKV:
    """The same for every step, so it is made once and shared by all rows that read it."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each layer, [1, K, t, d] each
    bias: Tensor | None = None  # [1, 1, 1, t], added to the scores of every layer; None: 0


def packed_order(geometries: Sequence[Any], reads: Sequence[CrossAttentionKV]) -> tuple[int, ...]:
    """The rows by geometry (which can be ordered), and within one by what they read (in order of first appearance)."""
    first: dict[int, int] = {}
    for read in reads:
        first.setdefault(id(read), len(first))
    return tuple(sorted(range(len(geometries)), key=lambda row: (geometries[row], first[id(reads[row])])))


def reading_runs(lengths: Sequence[int], reads: Sequence[CrossAttentionKV]) -> list[tuple[slice, CrossAttentionKV]]:
    """(tokens, what they read) of neighbouring rows that read the same. lengths: tokens of each packed row."""
    found: list[tuple[slice, CrossAttentionKV]] = []
    start = 0
    for length, read in zip(lengths, reads, strict=True):
        if found and found[-1][1] is read:
            found[-1] = (slice(found[-1][0].start, start + length), read)
        else:
            found.append((slice(start, start + length), read))
        start += length
    return found
