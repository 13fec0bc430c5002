"""How much went over every edge, since construction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vllm_omni.config.graph import Edge
from vllm_omni.payload import StreamChunk


@dataclass(slots=True)
class EdgeCounts:
    """What went over one edge."""

    bytes: int = 0  # of tensors, context included, whether or not anything was copied
    rows: int = 0  # new ones
    chunks: int = 0  # hand-overs, a whole payload being one


class EdgeTraffic:
    """Counts of every edge that something went over."""

    def __init__(self) -> None:
        self._counts: dict[Edge, EdgeCounts] = {}

    def count(self, edge: Edge, value: Any) -> None:
        """Something went over: a chunk, a tensor, or words and data, which count as neither bytes nor rows."""
        counts = self._counts.setdefault(edge, EdgeCounts())
        counts.chunks += 1
        if isinstance(value, StreamChunk):
            counts.bytes += _num_bytes(value.rows)
            counts.rows += value.stop - value.start
        elif isinstance(value, Tensor):
            counts.bytes += _num_bytes(value)
            counts.rows += len(value) if value.dim() else 0

    def count_inputs(self, edges: Iterable[Edge], inputs: Mapping[str, Any]) -> None:
        """What a stage starts with went over its edges, but for those that brought it nothing."""
        for edge in edges:
            if edge.target_port in inputs:
                self.count(edge, inputs[edge.target_port])

    def get_stats(self) -> dict[str, dict[str, int]]:
        """'a.out -> b.in' -> bytes, rows, chunks."""
        return {str(edge): asdict(counts) for edge, counts in list(self._counts.items())}


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
