"""A rank's share of a layer that several ranks compute together, and what they tell each other within it. Knows no
process and no network: who connects ranks is `worker.parallel`'s.

Legend: S ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """The ranks that share a layer. Every one of them calls the same methods in the same order with the same shapes."""

    def sum(self, partial: Tensor) -> Tensor:
        """What all ranks have, added: the same numbers on every rank, bit for bit."""

    def gather(self, part: Tensor) -> list[Tensor]:
        """The parts of all ranks, in their order."""

    def exchange(self, parts: Tensor) -> Tensor:
        """[S, ...], one part for each rank -> [S, ...], the one part of each rank that was for this one."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """Which share a rank has. Without peers a model can be built and loaded, but not run."""

    rank: int = 0
    size: int = 1
    peers: Peers | None = None

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    def part(self, count: int) -> int:
        """A rank's share of so many heads, inputs or outputs; the config was refused where that is no whole number."""
        assert count % self.size == 0, f"{count} are not divisible by {self.size} ranks"
        return count // self.size

    def sum(self, partial: Tensor) -> Tensor:
        """The whole product of parts that every rank has computed over its own inputs."""
        return partial if self.is_whole else self.connected.sum(partial)

    @property
    def connected(self) -> Peers:
        """The other ranks."""
        assert self.peers is not None, "the ranks are not connected"
        return self.peers


WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class Shards:
    """A rank's share of a transformer's blocks along each axis."""

    tensor: Shard = WHOLE  # of heads and widths
    sequence: Shard = WHOLE  # of each row's tokens; while they attend, of heads


ALONE = Shards()


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a published tensor a rank holds: its share of each of the segments that stand behind each other
    along one axis.
    """

    shard: Shard
    axis: int
    segments: tuple[int, ...]  # whole widths

    def whole_shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """Of the published tensor, whose part has this shape."""
        return (*part[: self.axis], sum(self.segments), *part[self.axis + 1 :])

    def ranges(self) -> list[slice]:
        """What is read along the axis, neighbours in order."""
        found, start = [], 0
        for width in self.segments:
            share = self.shard.part(width)
            found.append(slice(start + self.shard.rank * share, start + (self.shard.rank + 1) * share))
            start += width
        return found
