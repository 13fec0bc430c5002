"""What a token sees of its row where it does not see all of it. Knows no attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Band:
    """Tokens stand in blocks; each sees its own block, and some before and behind it. Blocks of one token are a window.

    offset: where in a block the first token of a row stands.
    """

    back: int
    ahead: int
    block: int = 1
    offset: int = 0

    @classmethod
    def window(cls, tokens: int) -> Band:
        """So many to each side."""
        return cls(tokens, tokens)

    def at(self, offset: int) -> Band:
        """The same for a row that begins elsewhere in a block."""
        return replace(self, offset=offset)

    def first(self, position: int) -> int:
        """Of the tokens that the one at a position would see of an endless row."""
        return ((position + self.offset) // self.block - self.back) * self.block - self.offset

    def stop(self, position: int) -> int:
        """Behind the last of them."""
        return ((position + self.offset) // self.block + self.ahead + 1) * self.block - self.offset

    def covers(self, length: int) -> bool:
        """Whether every token of a row sees all of it."""
        return self.first(length - 1) <= 0 and self.stop(0) >= length

    def sees(self, asking: Tensor, read: Tensor) -> Tensor:
        """Positions, which may be below 0, shaped to be broadcast -> bools."""
        distance = (read + self.offset).div(self.block, rounding_mode="floor")
        distance = distance - (asking + self.offset).div(self.block, rounding_mode="floor")
        return (distance >= -self.back) & (distance <= self.ahead)
