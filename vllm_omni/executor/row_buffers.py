"""The rows that are streamed to one stage, until its tasks have been given them; also before a task has begun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vllm_omni.executor.row_buffer import RowBuffer
from vllm_omni.payload import PortSpec, RowRange, StreamChunk, TensorSpec


class RowBuffers:
    """A RowBuffer for each streamed input of each request. inputs: the specs of the stage's input ports."""

    def __init__(self, inputs: Mapping[str, PortSpec]) -> None:
        self._inputs = inputs
        self._buffers: dict[tuple[str, str], RowBuffer] = {}  # (request id, input port)

    def __len__(self) -> int:
        return len(self._buffers)

    def push(self, request_id: str, port: str, rows: Tensor) -> None:
        """New rows [n, ...]; StageError for misshapen ones."""
        self._buffer(request_id, port).push(rows)

    def cut(self, request_id: str, port: str, wanted: RowRange) -> StreamChunk:
        """The chunk of these rows; frees what no later one brings along."""
        return self._buffer(request_id, port).cut(wanted)

    def cut_inputs(self, request_id: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a task starts with: as it is, but of a streamed port the chunk."""
        return {
            port: self.cut(request_id, port, value) if isinstance(value, RowRange) else value
            for port, value in inputs.items()
        }

    def compact(self) -> None:
        """Lets go of large tensors of which only a few rows are kept."""
        for buffer in self._buffers.values():
            buffer.compact()

    def drop(self, request_id: str) -> None:
        """Nothing is kept for a request any more; unknown ones are fine."""
        for key in [key for key in self._buffers if key[0] == request_id]:
            del self._buffers[key]

    def _buffer(self, request_id: str, port: str) -> RowBuffer:
        """Of one that ends without a row it is made when its one chunk is cut."""
        spec = self._inputs[port]
        shape = spec.row_shape if isinstance(spec, TensorSpec) else ()
        return self._buffers.setdefault((request_id, port), RowBuffer(shape))
