"""A KV pool that knows what stands in it, for tests of block tables without a model."""

from __future__ import annotations

from vllm_omni.core.ar.sequence import Sequence


class PoolContent:
    """Plays the KV tensor: remembers of which prefix, under which adapter, each slot holds the states, and objects when
    it is not the one expected.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[int, tuple[str | None, tuple[int, ...]]] = {}

    def compute(self, sequence: Sequence, start: int, end: int) -> None:
        """Computes tokens [start, end), which read everything before them."""
        self.check(sequence, start)
        for position in range(start, end):
            self._slots[self._slot(sequence, position)] = _prefix(sequence, position)

    def check(self, sequence: Sequence, end: int) -> None:
        """Tokens [0, end) stand where the block table says."""
        for position in range(end):
            assert self._slots[self._slot(sequence, position)] == _prefix(sequence, position)

    def _slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // self._block_size] * self._block_size + position % self._block_size


def _prefix(sequence: Sequence, position: int) -> tuple[str | None, tuple[int, ...]]:
    ids = sequence.token_ids if sequence.content_ids is None else sequence.content_ids
    return sequence.adapter, tuple(ids[: position + 1])
