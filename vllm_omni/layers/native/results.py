"""Memory for what the kernels give: within `reused_results` that of a result which nobody holds any more is the next
one's. The system would clear new pages for each, which takes an eighth of the time in which a picture is decoded.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

LEAST_BYTES = 2**20  # of a result; smaller ones cost nothing to speak of


class Reused:
    """What is idle is lent to results of exactly its size. Before new memory is taken, all that is idle is given back:
    there is never more of it than results hold at some moment by themselves.
    """

    def __init__(self) -> None:
        self._idle: dict[int, list[Tensor]] = defaultdict(list)  # by bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Not yet written, on the CPU."""
        num_bytes = math.prod(shape) * dtype.itemsize
        memory = self._take(num_bytes)
        lent = memory.numpy()  # held by the result's storage until that is gone
        weakref.finalize(lent, self._idle[num_bytes].append, memory)
        return torch.from_numpy(lent).view(dtype).view(*shape)

    def _take(self, num_bytes: int) -> Tensor:
        if idle := self._idle[num_bytes]:
            return idle.pop()
        for others in self._idle.values():
            others.clear()
        return torch.empty(num_bytes, dtype=torch.uint8)


_reused: ContextVar[Reused | None] = ContextVar("memory of results", default=None)


@contextmanager
def reused_results() -> Iterator[None]:
    """While large results follow each other. Memory goes back at the end, or with the last of what lies in it."""
    token = _reused.set(Reused())
    try:
        yield
    finally:
        _reused.reset(token)


def result(like: Tensor, *shape: int) -> Tensor:
    """Not yet written, of a tensor's dtype."""
    reused = _reused.get()
    if reused is None or math.prod(shape) * like.itemsize < LEAST_BYTES:
        return like.new_empty(shape)
    return reused.empty(shape, like.dtype)
