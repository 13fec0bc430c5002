"""The streamed edges of one request: which chunks go over them, whose writer pauses, who has waited too long.

Knows which stages run only as an argument, and nothing of their whole inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from vllm_omni.config.graph import Edge
from vllm_omni.core.routing.edge_stream import EdgeStream
from vllm_omni.errors import RequestTimeoutError, SchedulerError, StageError
from vllm_omni.payload import StagePayload, StreamChunk


class RequestStreams:
    """One EdgeStream an edge, from admission until its reader is done or skipped. paused: stages that were told to.

    A reader that has not started holds no writer back: it may be waiting for what that writer gives at its end.
    """

    def __init__(self, edges: Iterable[Edge]) -> None:
        self._streams = {edge: EdgeStream(edge.stream) for edge in edges if edge.stream is not None}
        self.paused: set[str] = set()
        self._ended: set[tuple[str, str]] = set()

    def touches(self, stage: str) -> bool:
        """Whether a stage writes or reads a stream."""
        return any(stage in (edge.source, edge.target) for edge in self._streams)

    def has_chunk(self, edge: Edge) -> bool:
        """Whether the reader of this edge could be given its next chunk."""
        return self._streams[edge].has_chunk

    def first_chunk(self, edge: Edge) -> StreamChunk:
        """What a reader starts with."""
        chunk = self._streams[edge].pop()
        assert chunk is not None, f"{edge}: a stage was launched before its first chunk"
        return chunk

    def push(self, origin: tuple[str, str], rows: Tensor, is_last: bool) -> list[Edge]:
        """Takes rows of a stage's port; the edges that have a chunk by that, and had none. StageError for bad rows."""
        if origin in self._ended:
            raise StageError(f"stage {origin[0]!r} gave rows of {origin[1]!r} after the last")
        if is_last:
            self._ended.add(origin)
        return self._write(origin, lambda stream: stream.push(rows, is_last))

    def close(self, payload: StagePayload) -> list[Edge]:
        """Their writer is done: what it gave no rows of is taken from its payload; as `push` otherwise."""
        self.paused.discard(payload.source)
        begun: list[Edge] = []
        for port in {edge.source_port for edge in self._streams if edge.source == payload.source}:
            begun += self._write((payload.source, port), partial(_complete, payload=payload, port=port))
        return begun

    def took(self, stage: str, port: str, now: float) -> None:
        """A reader has used up a chunk; what came over no stream is not counted. StageError when it had none."""
        for edge, stream in self._streams.items():
            if (edge.target, edge.target_port) == (stage, port):
                with _blaming(edge):
                    stream.took(now)

    def drop(self, edges: Iterable[Edge]) -> None:
        """Nobody will read these any more, or write them."""
        for edge in edges:
            self._streams.pop(edge, None)

    def hand_over(self, running: Collection[str]) -> Iterator[tuple[Edge, StreamChunk]]:
        """Every chunk that running readers can be given now."""
        for edge, stream in self._streams.items():
            while edge.target in running and (chunk := stream.pop()) is not None:
                yield edge, chunk

    def change_pauses(self, running: Collection[str]) -> tuple[set[str], set[str]]:
        """Stages that must pause now, and those that may go on."""
        full = {edge.source for edge, stream in self._streams.items() if stream.is_full and edge.target in running}
        to_pause, to_resume = full - self.paused, self.paused - full
        self.paused = full
        return to_pause, to_resume

    def on_first_chunk(self, running: Collection[str]) -> set[str]:
        """The running readers that have not used up what they began with."""
        return {edge.target for edge, stream in self._streams.items() if stream.is_on_first_chunk} & set(running)

    def overdue(self, running: Collection[str], held_back: Collection[str], now: float) -> RequestTimeoutError | None:
        """What to say when a reader has waited longer than its edge allows. Time does not count while its writer is
        held back for others, or can do nothing about it, being paused or waiting for a chunk itself, as long as some
        other stage can.
        """
        waiting = {edge: stream for edge, stream in self._streams.items() if stream.waiting_since is not None}
        held = self.paused | {edge.target for edge in waiting}
        for edge, stream in waiting.items():
            assert edge.stream is not None and stream.waiting_since is not None
            limit_s = edge.stream.chunk_timeout_s
            if edge.source in held_back or (edge.source in held and not held.issuperset(running)):
                stream.waiting_since = now
            elif now - stream.waiting_since >= limit_s:
                fix = "raise the edge's chunk_timeout_s"
                if edge.source in self.paused:
                    fix = f"{edge.source!r} is paused for a reader that waits too; raise max_ahead of the edges from it"
                return RequestTimeoutError(f"{edge}: no chunk came for {limit_s:g} s; {fix}")
        return None

    def check_integrity(self, running: Collection[str], settled: Collection[str]) -> None:
        """Raises SchedulerError when a stream has no reader to come or is open without a writer, or when a stage that
        does not run is paused.
        """
        for edge, stream in self._streams.items():
            stream.check_integrity()
            if edge.target in settled:
                raise SchedulerError(f"{edge}: rows are kept for a stage that has ended")
            if edge.source in settled and not stream.is_closed:
                raise SchedulerError(f"{edge}: open, though its writer has ended")
        if not self.paused <= set(running):
            raise SchedulerError(f"{sorted(self.paused)} are paused, but only {sorted(running)} run")

    def _write(self, origin: tuple[str, str], write: Callable[[EdgeStream], None]) -> list[Edge]:
        begun: list[Edge] = []
        for edge, stream in self._streams.items():
            if edge.origin == origin:
                had_chunk = stream.has_chunk
                with _blaming(edge):
                    write(stream)
                if stream.has_chunk and not had_chunk:
                    begun.append(edge)
        return begun


def _complete(stream: EdgeStream, payload: StagePayload, port: str) -> None:
    if not stream.num_written and port in payload.tensors:
        stream.push(payload.tensors[port])
    stream.close()


@contextmanager
def _blaming(edge: Edge) -> Iterator[None]:
    try:
        yield
    except StageError as error:
        raise StageError(f"{edge}: {error}") from error
