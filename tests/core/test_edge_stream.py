"""One streamed edge: chunks, contexts, what is held and what is copied."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streams import Stream
from torch import Tensor

from vllm_omni.config.schema import StreamConfig
from vllm_omni.errors import StageError
from vllm_omni.executor.row_buffer import RowBuffer
from vllm_omni.payload import StreamChunk


def rows(start: int, stop: int) -> Tensor:
    return torch.arange(2 * start, 2 * stop).reshape(-1, 2)


def drain(stream: Stream) -> list[StreamChunk]:
    chunks = []
    while (chunk := stream.pop()) is not None:
        chunks.append(chunk)
        stream.check_integrity()
    return chunks


def spans(chunks: list[StreamChunk]) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.stop) for chunk in chunks]


@st.composite
def stream_configs(draw: st.DrawFn) -> StreamConfig:
    first, chunk, ahead = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 4))
    largest = draw(st.one_of(st.none(), st.integers(chunk, 20)))
    most = max(first, chunk, largest or 0) + ahead + draw(st.integers(0, 8))
    return StreamConfig(first, chunk, draw(st.integers(0, 7)), ahead, most, max_chunk=largest)


Pushes = list[tuple[int, bool, bool]]
PUSHES = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), min_size=1, max_size=15)


@settings(max_examples=200, deadline=None)
@given(stream_configs(), PUSHES.filter(lambda pushes: any(size for size, _, _ in pushes)), st.booleans())
def test_chunks_put_together_are_the_rows_whatever_the_pushes(
    config: StreamConfig, pushes: Pushes, ends_with_rows: bool
) -> None:
    """pushes: how many rows, whether the chunks are popped after it, whether the reader consumes one."""
    stream, chunks, written = Stream(config), [], 0
    for index, (size, pops, takes) in enumerate(pushes):
        stream.push(rows(written, written + size), ends_with_rows and index == len(pushes) - 1)
        written += size
        if pops:
            popped = drain(stream)
            chunks += popped
            assert stream.buffer.num_held < config.left_context + config.largest_chunk + config.look_ahead
            if popped and takes:
                stream.consume(0.0)
        stream.check_integrity()
    stream.close()
    chunks += drain(stream)
    whole = rows(0, written)
    assert torch.equal(torch.cat([chunk.new_rows for chunk in chunks]), whole)
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert stream.buffer.num_held == 0
    check_contexts(chunks, config, whole)


def check_contexts(chunks: list[StreamChunk], config: StreamConfig, whole: Tensor) -> None:
    start, sizes = 0, sizes_of(config)
    for chunk, size in zip(chunks, sizes, strict=False):
        assert chunk.start == start and chunk.num_before == min(config.left_context, start)
        assert chunk.stop - chunk.start <= size
        if not chunk.is_last:
            assert chunk.stop - chunk.start == size
        assert chunk.num_after == min(config.look_ahead, len(whole) - chunk.stop)
        assert torch.equal(chunk.rows, whole[start - chunk.num_before : chunk.stop + chunk.num_after])
        start = chunk.stop


def sizes_of(config: StreamConfig) -> Iterator[int]:
    yield config.first_chunk
    size = config.chunk
    while True:
        yield size
        size = max(size, min(2 * size, config.max_chunk or size))


def test_chunks_double_up_to_their_largest() -> None:
    stream = Stream(StreamConfig(first_chunk=1, chunk=3, max_chunk=10, look_ahead=1))
    stream.push(rows(0, 40), True)
    assert [chunk.stop - chunk.start for chunk in drain(stream)] == [1, 3, 6, 10, 10, 10]


def test_a_reader_is_on_its_first_chunk_until_it_has_used_it_up() -> None:
    stream = Stream(StreamConfig(first_chunk=2, chunk=2))
    assert not stream.is_on_first_chunk
    stream.push(rows(0, 4))
    assert not stream.is_on_first_chunk
    stream.pop()
    stream.pop()
    assert stream.is_on_first_chunk
    stream.consume(0.0)
    assert not stream.is_on_first_chunk


def test_a_chunk_waits_for_its_look_ahead_and_the_rest_comes_when_the_stream_ends() -> None:
    stream = Stream(StreamConfig(first_chunk=2, chunk=3, look_ahead=2))
    stream.push(rows(0, 3))
    assert stream.pop() is None
    stream.push(rows(3, 8))
    assert spans(drain(stream)) == [(0, 2), (2, 5)]
    stream.close()
    (last,) = drain(stream)
    assert spans([last]) == [(5, 8)] and last.is_last and last.num_after == 0


def test_an_end_without_new_rows_is_said_by_an_empty_chunk_with_its_context() -> None:
    for left, shape in ((0, [0, 2]), (3, [3, 2])):
        stream = Stream(StreamConfig(chunk=4, first_chunk=4, left_context=left))
        stream.push(rows(0, 4))
        assert [chunk.is_last for chunk in drain(stream)] == [False]
        stream.close()
        (last,) = drain(stream)
        assert last.is_last and len(last.new_rows) == 0 and list(last.rows.shape) == shape
        assert last.start == last.stop == 4 and last.rows.dtype == torch.int64


def test_the_writer_is_full_when_it_is_max_ahead_of_what_has_been_consumed() -> None:
    stream = Stream(StreamConfig(chunk=2, first_chunk=2, max_ahead=4))
    stream.push(rows(0, 3))
    assert not stream.is_full
    stream.push(rows(3, 4))
    assert stream.is_full and len(drain(stream)) == 2 and stream.is_full
    stream.consume(0.0)
    assert not stream.is_full
    stream.push(rows(4, 8), is_last=True)
    assert not stream.is_full  # there is nothing left to hold back


def test_a_reader_waits_from_when_it_has_consumed_everything_until_the_next_chunk() -> None:
    stream = Stream(StreamConfig(chunk=2, first_chunk=1))
    assert stream.waiting_since is None
    stream.push(rows(0, 3))
    assert len(drain(stream)) == 2
    stream.consume(1.0)
    assert stream.waiting_since is None
    stream.consume(2.0)
    assert stream.waiting_since == 2.0
    stream.push(rows(3, 4))
    assert stream.pop() is None and stream.waiting_since == 2.0
    stream.close()
    assert stream.pop() is not None and stream.waiting_since is None
    stream.consume(3.0)
    assert stream.waiting_since is None


def test_a_push_that_is_a_chunk_passes_as_the_same_tensor_and_larger_ones_as_views() -> None:
    stream, first, second = Stream(StreamConfig(first_chunk=4, chunk=2)), rows(0, 4), rows(4, 10)
    stream.push(first)
    (chunk,) = drain(stream)
    assert chunk.rows is first
    stream.push(second)
    assert [chunk.rows.data_ptr() for chunk in drain(stream)] == [second[i].data_ptr() for i in (0, 2, 4)]


def test_a_small_rest_of_a_large_push_does_not_keep_it_in_memory() -> None:
    stream, large = Stream(StreamConfig(chunk=8, first_chunk=8, left_context=4)), rows(0, 801)
    stream.push(large)
    drain(stream)
    assert stream.buffer.num_held == 5
    storages = {piece.untyped_storage().data_ptr() for piece in stream.buffer._pieces}
    assert large.untyped_storage().data_ptr() not in storages
    stream.push(rows(801, 808))
    (chunk,) = drain(stream)
    assert torch.equal(chunk.rows, rows(796, 808))


def test_nothing_is_consumed_that_was_not_given() -> None:
    stream = Stream(StreamConfig())
    stream.push(rows(0, 1))
    with pytest.raises(StageError, match="than were given"):
        stream.consume(0.0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (torch.zeros(1, 3), r"got rows \[3\] of torch.float32 .* after \[2\] of torch.int64"),
        (rows(0, 1).int(), r"torch\.int32 on cpu after \[2\] of torch\.int64"),
        (torch.tensor(3), "got a number"),
    ],
)
def test_rows_of_another_shape_are_refused(more: Tensor, words: str) -> None:
    stream = Stream(StreamConfig())
    stream.push(rows(0, 1))
    with pytest.raises(StageError, match=words):
        stream.push(more)


def test_an_end_without_any_row_is_one_empty_chunk_of_the_declared_shape() -> None:
    stream = Stream(StreamConfig())
    stream.buffer = RowBuffer((3, 2))
    assert not stream.has_chunk
    stream.close()
    (only,) = drain(stream)
    assert only.is_last and only.rows.shape == (0, 3, 2) and only.start == only.stop == 0
    stream.consume(0.0)
    assert stream.is_finished and not stream.is_full and not stream.is_on_first_chunk


def test_rows_after_the_last_are_refused() -> None:
    stream = Stream(StreamConfig())
    stream.push(rows(0, 1), is_last=True)
    stream.close()
    with pytest.raises(StageError, match="after the last"):
        stream.push(rows(1, 2))
