"""One streamed input of a talker: the rows that have come so far. Their order is the sender's."""

from __future__ import annotations

from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.payload import StreamChunk


class StreamedRows:
    """width: of a row; None: rows are single numbers."""

    def __init__(self, name: str, width: int | None) -> None:
        self.parts: list[Tensor] = []
        self.num_rows = 0
        self.is_whole = False
        self._name = name
        self._shape = () if width is None else (width,)

    def accept(self, chunk: StreamChunk) -> Tensor:
        """The chunk's new rows; StageError for rows of another shape."""
        rows = chunk.new_rows
        if tuple(rows.shape[1:]) != self._shape or not rows.ndim:
            expected = ", ".join(["n", *map(str, self._shape)])
            raise StageError(
                f"stage input {self._name!r}: got rows {list(rows.shape)}, expected [{expected}]; does the edge come "
                "from a stage of the same checkpoint?"
            )
        self.num_rows += len(rows)
        self.is_whole = chunk.is_last
        self.parts.append(rows)
        return rows
