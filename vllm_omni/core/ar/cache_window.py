"""How much of a sequence its KV blocks must hold when every layer of the model sees only a window of the past. Numbers
only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheWindow:
    """What of the past the next token can still read."""

    size: int  # tokens up to its own that a token sees in the layer that sees most
    max_chunk: int  # tokens of a sequence that one step computes at most

    def first_block(self, position: int, block_size: int) -> int:
        """The first block that the token at a position, or any after it, reads."""
        return max(0, position - self.size + 1) // block_size

    def most_blocks(self, block_size: int) -> int:
        """The most blocks that a sequence of any length holds at once: what its first new token sees and the new ones,
        wherever the blocks begin.
        """
        return (self.size - 1 + self.max_chunk + block_size - 2) // block_size + 1
