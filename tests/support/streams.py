"""One streamed edge as the loop runs it: the scheduler's counts and the rows that the reader's host keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vllm_omni.config.schema import StreamConfig
from vllm_omni.core.routing.edge_stream import EdgeStream
from vllm_omni.executor.row_buffer import RowBuffer
from vllm_omni.payload import StreamChunk


class Stream:
    """Rows in, chunks out."""

    def __init__(self, config: StreamConfig) -> None:
        self.counts = EdgeStream(config)
        self.buffer = RowBuffer()

    def push(self, rows: Tensor, is_last: bool = False) -> None:
        self.counts.push(len(rows) if rows.dim() else 0, is_last)
        self.buffer.push(rows)

    def pop(self) -> StreamChunk | None:
        wanted = self.counts.pop()
        if wanted is None:
            self.buffer.compact()
            return None
        return self.buffer.cut(wanted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.counts, name)
