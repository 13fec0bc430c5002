"""The streamed edges of one request: which chunks go over them, whose writer pauses, who has waited too long.

Knows which stages run only as an argument, and nothing of their whole inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from vllm_omni.config.graph import CALLER, Edge
from vllm_omni.config.schema import StreamConfig
from vllm_omni.core.routing.edge_stream import CallerStream, EdgeStream
from vllm_omni.errors import RequestTimeoutError, SchedulerError, StageError
from vllm_omni.payload import RowRange


class RequestStreams:
    """One EdgeStream an edge, from admission until its reader is done or skipped.

    A reader that has not started holds no writer back: it may be waiting for what that writer gives at its end.
    """

    def __init__(self, edges: Iterable[Edge]) -> None:
        self._streams = {edge: _stream_of(edge, edge.stream) for edge in edges if edge.stream is not None}
        self.paused: set[str] = set()  # stages that were told to
        self._ended: set[tuple[str, str]] = set()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is streamed, and nobody is to go on."""
        return not self._streams and not self.paused

    @property
    def is_caller_writing(self) -> bool:
        """Whether more may come from the caller that a stage is to read."""
        return any(edge.source == CALLER and not stream.is_closed for edge, stream in self._streams.items())

    def touches(self, stage: str) -> bool:
        """Whether a stage writes or reads a stream."""
        return any(stage in (edge.source, edge.target) for edge in self._streams)

    def has_chunk(self, edge: Edge) -> bool:
        """Whether the reader of this edge could be given its next chunk."""
        return self._streams[edge].has_chunk

    def is_waiting(self, stage: str) -> bool:
        """Whether a running stage may have nothing to do: it is paused, or chunks of an input are still to come."""
        unfinished = (edge.target for edge, stream in self._streams.items() if not stream.is_finished)
        return stage in self.paused or stage in unfinished

    def readers(self, origin: tuple[str, str]) -> list[Edge]:
        """The edges over which a stage's port is streamed."""
        return [edge for edge in self._streams if edge.origin == origin]

    def first_chunk(self, edge: Edge) -> RowRange:
        """What a reader starts with."""
        chunk = self._streams[edge].pop()
        assert chunk is not None, f"{edge}: a stage was launched before its first chunk"
        return chunk

    def push(self, origin: tuple[str, str], num_rows: int, is_last: bool) -> list[Edge]:
        """So many more rows of a stage's port; the edges that have a chunk by that, and had none. StageError for rows
        after the last.
        """
        if origin in self._ended:
            raise StageError(f"stage {origin[0]!r} gave rows of {origin[1]!r} after the last")
        if is_last:
            self._ended.add(origin)
        return self._write(self.readers(origin), lambda stream: stream.push(num_rows, is_last))

    def close(self, source: str) -> list[Edge]:
        """A writer is done; as `push` otherwise."""
        self.paused.discard(source)
        return self._write([edge for edge in self._streams if edge.source == source], EdgeStream.close)

    def consume(self, stage: str, port: str, now: float) -> None:
        """A reader has consumed a chunk; what came over no stream is not counted. StageError when it had none."""
        for edge, stream in self._streams.items():
            if (edge.target, edge.target_port) == (stage, port):
                with _blaming(edge):
                    stream.consume(now)

    def drop(self, edges: Iterable[Edge]) -> None:
        """Nobody will read these any more, or write them."""
        for edge in edges:
            self._streams.pop(edge, None)

    def hand_over(self, running: Collection[str]) -> Iterator[tuple[Edge, RowRange]]:
        """Every chunk that running readers can be given now."""
        for edge, stream in self._streams.items():
            while edge.target in running and (chunk := stream.pop()) is not None:
                yield edge, chunk

    def change_pauses(self, running: Collection[str], too_fast: Collection[str] = ()) -> tuple[set[str], set[str]]:
        """Stages that must pause now, and those that may go on. too_fast: running ones that write for a caller who does
        not keep up.
        """
        full = {edge.source for edge, stream in self._streams.items() if stream.is_full and edge.target in running}
        full |= set(too_fast)
        to_pause, to_resume = full - self.paused, self.paused - full
        self.paused = full
        return to_pause, to_resume

    def on_first_chunk(self, running: Collection[str]) -> set[str]:
        """The running readers that have not consumed what they began with."""
        return {edge.target for edge, stream in self._streams.items() if stream.is_on_first_chunk} & set(running)

    def overdue(self, running: Collection[str], held_back: Collection[str], now: float) -> RequestTimeoutError | None:
        """The error of a reader that has waited longer than its edge allows.

        Time counts only while its writer could do something about it. It cannot while it is held back for others, nor
        while it is paused or waits for a chunk itself, unless no other stage could go on either. While a reader
        waits for the caller it counts for nobody: that is between the caller and the request's deadline.
        """
        waiting = {edge: stream for edge, stream in self._streams.items() if stream.waiting_since is not None}
        is_callers_turn = any(edge.source == CALLER for edge in waiting)
        held = self.paused | {edge.target for edge in waiting}
        for edge, stream in waiting.items():
            assert edge.stream is not None and stream.waiting_since is not None
            limit_s = edge.stream.chunk_timeout_s
            if is_callers_turn or edge.source in held_back or (edge.source in held and not held.issuperset(running)):
                stream.waiting_since = now
            elif now - stream.waiting_since >= limit_s:
                fix = "raise the edge's chunk_timeout_s"
                if edge.source in self.paused:
                    fix = f"{edge.source!r} is paused for a reader that waits too; raise max_ahead of the edges from it"
                return RequestTimeoutError(f"{edge}: no chunk came for {limit_s:g} s; {fix}")
        return None

    def check_integrity(self, running: Collection[str], ended: Collection[str]) -> None:
        """Raises SchedulerError when a stream has no reader to come or is open without a writer, or when a stage that
        does not run is paused.
        """
        for edge, stream in self._streams.items():
            stream.check_integrity()
            if edge.target in ended:
                raise SchedulerError(f"{edge}: rows are kept for a stage that has ended")
            if edge.source in ended and not stream.is_closed:
                raise SchedulerError(f"{edge}: open, though its writer has ended")
        if not self.paused <= set(running):
            raise SchedulerError(f"{sorted(self.paused)} are paused, but only {sorted(running)} run")

    def _write(self, edges: Iterable[Edge], write: Callable[[EdgeStream], None]) -> list[Edge]:
        begun: list[Edge] = []
        for edge in edges:
            stream = self._streams[edge]
            had_chunk = stream.has_chunk
            with _blaming(edge):
                write(stream)
            if stream.has_chunk and not had_chunk:
                begun.append(edge)
        return begun


def _stream_of(edge: Edge, config: StreamConfig) -> EdgeStream:
    return CallerStream(config) if edge.source == CALLER else EdgeStream(config)


@contextmanager
def _blaming(edge: Edge) -> Iterator[None]:
    try:
        yield
    except StageError as error:
        raise StageError(f"{edge}: {error}") from error
