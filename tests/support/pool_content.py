"""A KV pool that knows what stands in it, for tests of block tables without a model."""

from __future__ import annotations

from vllm_omni.core.ar.sequence import Sequence


class PoolContent:
    """Plays the KV tensor: remembers of which prefix, under which adapter, each slot holds the states, and objects when
    it is not the one expected.
    """

    def __init__(self, block_size: int, window: int | None = None) -> None:
        """window: the tokens up to its own that a token reads; None: all of them."""
        self._block_size = block_size
        self._window = window
        self._slots: dict[int, tuple[str | None, tuple[int, ...]]] = {}

    def compute(self, sequence: Sequence, start: int, end: int) -> None:
        """Computes tokens [start, end), which read what they see before them."""
        self.check(sequence, start)
        for position in range(start, end):
            self._slots[self._slot(sequence, position)] = _prefix(sequence, position)

    def check(self, sequence: Sequence, end: int) -> None:
        """What of the tokens [0, end) the next one sees stands where the block table says."""
        first = 0 if self._window is None else max(0, end - self._window + 1)
        for position in range(first, end):
            assert self._slots[self._slot(sequence, position)] == _prefix(sequence, position)

    def _slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // self._block_size] * self._block_size + position % self._block_size


def _prefix(sequence: Sequence, position: int) -> tuple[str | None, tuple[int, ...]]:
    ids = sequence.token_ids if sequence.content_ids is None else sequence.content_ids
    return sequence.adapter, tuple(ids[: position + 1])
