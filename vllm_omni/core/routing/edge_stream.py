"""One streamed edge of one request: rows in, chunks out. Knows no stage, no other edge and no clock.

Rows pass by reference; only what spans several pushes, or is a small rest of a large one, is copied.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from vllm_omni.config.schema import StreamConfig
from vllm_omni.errors import SchedulerError, StageError
from vllm_omni.payload import StreamChunk


class EdgeStream:
    """The rows of a port that its reader may still need.

    num_written: rows that were pushed. waiting_since: since when the reader has used up all it was given; None while it
    has something to do, before its first chunk and after its last.
    """

    def __init__(self, config: StreamConfig) -> None:
        self.num_written = 0
        self.waiting_since: float | None = None
        self._config = config
        self._pieces: deque[Tensor] = deque()  # the rows [_first, num_written)
        self._first = 0
        self._num_handed = 0
        self._num_used = 0
        self._next_size = config.first_chunk
        self._later_size = config.chunk
        self._untaken: deque[int] = deque()  # new rows of the chunks that the reader has yet to use up
        self._empty: Tensor | None = None
        self._is_closed = False
        self._is_finished = False

    @property
    def is_closed(self) -> bool:
        """Whether all rows are written."""
        return self._is_closed

    @property
    def is_full(self) -> bool:
        """Whether the writer is so far ahead of what has been used up that it must pause."""
        return not self._is_closed and self.num_written - self._num_used >= self._config.max_ahead

    @property
    def is_on_first_chunk(self) -> bool:
        """Whether the reader has been given its first chunk, and has not used it up."""
        return bool(self._untaken) and not self._num_used

    @property
    def num_held(self) -> int:
        """Rows that are kept."""
        return self.num_written - self._first

    @property
    def has_chunk(self) -> bool:
        """Whether `pop` would give one."""
        if self._is_closed:
            return not self._is_finished
        return self.num_written - self._num_handed >= self._next_size + self._config.look_ahead

    def push(self, rows: Tensor, is_last: bool = False) -> None:
        """Takes new rows [n, ...]; StageError for rows of another shape, after the last, or where there are none."""
        if self._is_closed:
            raise StageError(f"got {list(rows.shape)} more rows after the last")
        self._check_shape(rows)
        if len(rows):
            self._pieces.append(rows)
            self.num_written += len(rows)
        if is_last:
            self.close()

    def close(self) -> None:
        """No rows follow; may be called twice. StageError when there were none at all."""
        if not self.num_written:
            raise StageError("it ended without a row; if the source made nothing, raise its min_tokens")
        self._is_closed = True

    def pop(self) -> StreamChunk | None:
        """The next chunk, if its rows are there."""
        if not self.has_chunk:
            self._let_go_of_large_pieces()
            return None
        start, num_after = self._num_handed, self._config.look_ahead
        num_new = self._next_size
        if self._is_closed:
            num_new = min(num_new, self.num_written - start)
            num_after = min(num_after, self.num_written - start - num_new)
        num_before = min(self._config.left_context, start)
        self._grow()
        self._num_handed += num_new
        self._untaken.append(num_new)
        self._is_finished = self._is_closed and self._num_handed == self.num_written
        self.waiting_since = None
        rows = self._rows(start - num_before, start + num_new + num_after)
        self._forget_rows()
        return StreamChunk(rows, start, num_before, num_after, self._is_finished)

    def took(self, now: float) -> None:
        """The reader has used up one more chunk; StageError when it had none."""
        if not self._untaken:
            raise StageError("one more chunk was used up than were given")
        self._num_used += self._untaken.popleft()
        if not self._untaken and not self._is_finished:
            self.waiting_since = now

    def check_integrity(self) -> None:
        """Raises SchedulerError when rows are held in vain or counts disagree."""
        needed_from = max(0, self._num_handed - self._config.left_context)
        if self._is_finished:
            needed_from = self.num_written
        if self._first != needed_from or sum(map(len, self._pieces)) != self.num_held:
            raise SchedulerError(
                f"a stream holds {sum(map(len, self._pieces))} rows from {self._first}, "
                f"expected {self.num_written - needed_from} from {needed_from}"
            )
        if self._num_used + sum(self._untaken) != self._num_handed or self._num_handed > self.num_written:
            raise SchedulerError(
                f"a stream has {self.num_written} rows: {self._num_handed} handed over, {self._num_used} used up"
            )

    def _grow(self) -> None:
        self._next_size = self._later_size
        self._later_size = max(self._later_size, min(2 * self._later_size, self._config.max_chunk or 0))

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
        assert self._empty is not None  # a chunk has been asked for, so rows were pushed
        return torch.cat(found) if found else self._empty

    def _forget_rows(self) -> None:
        """Drops what no later chunk brings along."""
        keep_from = self.num_written if self._is_finished else max(0, self._num_handed - self._config.left_context)
        while self._pieces and self._first + len(self._pieces[0]) <= keep_from:
            self._first += len(self._pieces.popleft())
        if self._first < keep_from:
            self._pieces[0] = self._pieces[0][keep_from - self._first :]
            self._first = keep_from

    def _let_go_of_large_pieces(self) -> None:
        """Copies what is a small part of the memory that it keeps alive. It will be copied anyway, for a chunk that
        spans pieces.
        """
        for index in {0, len(self._pieces) - 1} if self._pieces else ():
            piece = self._pieces[index]
            if piece.untyped_storage().nbytes() > 2 * piece.numel() * piece.element_size():
                self._pieces[index] = piece.clone()
