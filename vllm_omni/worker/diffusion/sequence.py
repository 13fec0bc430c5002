"""Packed rows of which a rank computes a share of every row's tokens. Knows no weights.

Legend: N packed tokens of all rows, L tokens of a row, D width, S ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.layers.shard import Shard
from vllm_omni.worker.diffusion.packing import Span, joined


@dataclass(slots=True)
class SplitRows:
    """What blocks work on."""

    hidden: Tensor  # [N / S, D]
    spans: Sequence[Span]  # where the shares of the rows lie in it


@contextmanager
def split_sequence(hidden: Tensor, spans: Sequence[Span], sequence: Shard) -> Iterator[SplitRows]:
    """hidden: [N, D], the rows' lengths divisible by S. Within it are this rank's tokens of every row; behind it the
    hidden states are whole again, on every rank.
    """
    if sequence.is_whole:
        yield SplitRows(hidden, spans)
        return
    split = SplitRows(*_share(hidden, spans, sequence))
    yield split
    parts = sequence.connected.gather(split.hidden)
    dense = [[part[span.tokens].unflatten(0, (span.num_rows, -1)) for part in parts] for span in split.spans]
    split.hidden = joined([torch.cat(of_ranks, dim=1).flatten(0, 1) for of_ranks in dense])


def _share(hidden: Tensor, spans: Sequence[Span], sequence: Shard) -> tuple[Tensor, list[Span]]:
    parts, shares, start = [], list[Span](), 0
    for span in spans:
        length = sequence.part(span.length)
        own = slice(sequence.rank * length, (sequence.rank + 1) * length)
        parts.append(hidden[span.tokens].unflatten(0, (span.num_rows, span.length))[:, own].flatten(0, 1))
        stop = start + span.num_rows * length
        shares.append(Span(span.rows, slice(start, stop), span.num_rows, length, span.rope[own]))
        start = stop
    return joined(parts), shares
