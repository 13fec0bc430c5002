"""The rows of one streamed port that one reader may still need, and the chunks that are cut from them.

Which rows make up a chunk is the scheduler's part. Rows pass by reference; only what spans several pushes, or is a
small rest of a large one, is copied.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.payload import RowRange, StreamChunk


class RowBuffer:
    """Holds the rows [first, end) of a port, end being all that were pushed.

    row_shape: of the one empty chunk of a port that ends before anything was pushed.
    """

    def __init__(self, row_shape: tuple[int, ...] = ()) -> None:
        self._pieces: deque[Tensor] = deque()
        self._first = 0
        self._row_shape = row_shape
        self._empty: Tensor | None = None  # [0, ...]: what every row must be like

    @property
    def num_held(self) -> int:
        return sum(map(len, self._pieces))

    def push(self, rows: Tensor) -> None:
        """Takes new rows [n, ...]; StageError for rows of another shape, dtype or device."""
        self._check_shape(rows)
        if len(rows):
            self._pieces.append(rows)

    def cut(self, wanted: RowRange) -> StreamChunk:
        """The chunk of these rows; frees what no later one brings along."""
        rows = self._rows(wanted.start - wanted.num_before, wanted.stop + wanted.num_after)
        self._free_before(wanted.keep_from)
        return StreamChunk(rows, wanted.start, wanted.num_before, wanted.num_after, wanted.is_last)

    def compact(self) -> None:
        """Copies what is a small part of the memory that it keeps alive, for when no chunk can be cut: it would be
        copied anyway, for one that spans pieces.
        """
        for index in {0, len(self._pieces) - 1} if self._pieces else ():
            piece = self._pieces[index]
            if piece.untyped_storage().nbytes() > 2 * piece.numel() * piece.element_size():
                self._pieces[index] = piece.clone()

    def _check_shape(self, rows: Tensor) -> None:
        if not rows.dim():
            raise StageError("got a number, expected rows [n, ...]")
        if self._empty is None:
            self._empty = rows.new_empty((0, *rows.shape[1:]))
        expected = self._empty
        if (rows.shape[1:], rows.dtype, rows.device) != (expected.shape[1:], expected.dtype, expected.device):
            raise StageError(
                f"got rows {list(rows.shape[1:])} of {rows.dtype} on {rows.device} after "
                f"{list(expected.shape[1:])} of {expected.dtype} on {expected.device}"
            )

    def _rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, ...]: a piece itself or a view of one where they lie in it, else a copy."""
        found: list[Tensor] = []
        begin = self._first
        for piece in self._pieces:
            low, high = max(start - begin, 0), min(stop - begin, len(piece))
            if low < high:
                found.append(piece if high - low == len(piece) else piece[low:high])
            begin += len(piece)
            if begin >= stop:
                break
        if len(found) == 1:
            return found[0]
        if found:
            return torch.cat(found)
        return torch.empty(0, *self._row_shape) if self._empty is None else self._empty

    def _free_before(self, row: int) -> None:
        while self._pieces and self._first + len(self._pieces[0]) <= row:
            self._first += len(self._pieces.popleft())
        if self._pieces and self._first < row:
            self._pieces[0] = self._pieces[0][row - self._first :]
            self._first = row
