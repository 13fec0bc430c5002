"""Where a rank stands among those that share a model. Knows no process.

Ranks are counted with the axis `tensor` fastest, so that those that sum within every layer are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_omni.config.schema import ParallelConfig

Axis = Literal["tensor", "sequence", "guidance"]
AXES: tuple[Axis, ...] = ("tensor", "sequence", "guidance")


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place."""

    config: ParallelConfig
    rank: int

    @property
    def tensor(self) -> int:
        return self.rank % self.config.tensor

    @property
    def sequence(self) -> int:
        return self.rank // self.config.tensor % self.config.sequence

    @property
    def guidance(self) -> int:
        return self.rank // (self.config.tensor * self.config.sequence)

    def line(self, axis: Axis) -> list[int]:
        """The ranks that differ from this one along one axis alone, itself among them, in their order."""
        stride = {"tensor": 1, "sequence": self.config.tensor, "guidance": self.config.tensor * self.config.sequence}
        own: int = getattr(self, axis)
        count: int = getattr(self.config, axis)
        return [self.rank + (other - own) * stride[axis] for other in range(count)]
