"""One streamed edge of one request: how many rows were written, and which of them make up the next chunk.

Counts rows and holds none; knows no stage, no other edge and no clock.
"""

from __future__ import annotations

from collections import deque

from vllm_omni.config.schema import StreamConfig
from vllm_omni.errors import SchedulerError, StageError
from vllm_omni.payload import RowRange


class EdgeStream:
    """The chunks of a port for one reader."""

    def __init__(self, config: StreamConfig) -> None:
        self.num_written = 0
        self.is_closed = False  # all rows are written
        self.is_finished = False  # the last chunk has been handed over
        # Since when the reader has consumed all it was given; None while it has something to do, before its first chunk
        # and after its last.
        self.waiting_since: float | None = None
        self._config = config
        self._num_handed = 0
        self._num_consumed = 0
        self._next_size = config.first_chunk
        self._later_size = config.chunk
        self._unconsumed: deque[int] = deque()  # new rows of the chunks that the reader has yet to consume

    @property
    def is_full(self) -> bool:
        """Whether the writer is so far ahead of what has been consumed that it must pause."""
        return not self.is_closed and self.num_written - self._num_consumed >= self._config.max_ahead

    @property
    def is_on_first_chunk(self) -> bool:
        """Whether the reader has been given its first chunk, and has not consumed it."""
        return bool(self._unconsumed) and not self._num_consumed

    @property
    def has_chunk(self) -> bool:
        """Whether `pop` would give one."""
        if self.is_closed:
            return not self.is_finished
        return self.num_written - self._num_handed >= self._next_size + self._config.look_ahead

    def push(self, num_rows: int, is_last: bool = False) -> None:
        """The writer has made so many rows more; StageError after the last."""
        if self.is_closed:
            raise StageError(f"got {num_rows} more rows after the last")
        self.num_written += num_rows
        if is_last:
            self.close()

    def close(self) -> None:
        """No rows follow; may be called twice. A stream without any row is one empty chunk."""
        self.is_closed = True

    def pop(self) -> RowRange | None:
        """The next chunk, if its rows are there."""
        if not self.has_chunk:
            return None
        # 1 as many new rows as are due; of a stream that has ended, as many as are left
        start, num_new, num_after = self._num_handed, self._next_size, self._config.look_ahead
        if self.is_closed:
            num_new = min(num_new, self.num_written - start)
            num_after = min(num_after, self.num_written - start - num_new)
        num_before = min(self._config.left_context, start)
        # 2 they are handed over
        self._num_handed = start + num_new
        self._unconsumed.append(num_new)
        self.is_finished = self.is_closed and self._num_handed == self.num_written
        self.waiting_since = None
        # 3 the next ones may be more, and bring the last of these along
        self._next_size = self._later_size
        self._later_size = max(self._later_size, min(2 * self._later_size, self._config.max_chunk or 0))
        keep_from = self.num_written if self.is_finished else max(0, self._num_handed - self._config.left_context)
        return RowRange(start, self._num_handed, num_before, num_after, self.is_finished, keep_from)

    def consume(self, now: float) -> None:
        """The reader has consumed one more chunk; StageError when it had none."""
        if not self._unconsumed:
            raise StageError("one more chunk was consumed than were given")
        self._num_consumed += self._unconsumed.popleft()
        if not self._unconsumed and not self.is_finished:
            self.waiting_since = now

    def check_integrity(self) -> None:
        """Raises SchedulerError when counts disagree."""
        if self._num_consumed + sum(self._unconsumed) != self._num_handed or self._num_handed > self.num_written:
            raise SchedulerError(
                f"a stream has {self.num_written} rows: {self._num_handed} handed over, {self._num_consumed} consumed"
            )


class CallerStream(EdgeStream):
    """What the caller writes, who is never told to pause: a chunk is whatever has come."""

    @property
    def is_full(self) -> bool:
        return False

    def pop(self) -> RowRange | None:
        self._next_size = max(1, self.num_written - self._num_handed)
        return super().pop()
