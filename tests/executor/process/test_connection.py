"""Frames and tensors over a socket pair: one copy or none, memory that is used again and never leaks, lies refused."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.connections import Pair
from torch import Tensor

from vllm_omni.executor.process.connection import HEADER, MAX_LENGTH, Connection
from vllm_omni.executor.process.segments import MAX_KEPT_BYTES, Segments
from vllm_omni.executor.wire.base import WireError
from vllm_omni.executor.wire.table import WireTypes


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def large(fill: float = 1.0, rows: int = 100_000) -> Tensor:
    return torch.full((rows, 2), fill)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.arange(5) > 2,
        torch.ones(2, 2, dtype=torch.complex64).conj(),
        torch.arange(60_000).reshape(300, 200).T,
        torch.ones(100_000, dtype=torch.uint8)[::2],
        torch.ones(70_000, requires_grad=True) * 2,
        torch.ones(100_000, dtype=torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_tensors_of_any_kind_arrive(pair: Pair, tensor: Tensor) -> None:
    found = pair.send({"x": [tensor]})["x"][0]
    assert found.dtype == tensor.dtype and found.shape == tensor.shape and not found.requires_grad
    assert torch.equal(found.to(torch.complex64), tensor.detach().to(torch.complex64))


def test_memory_is_used_again_once_nobody_holds_its_tensors(pair: Pair) -> None:
    kept = pair.send(large(3.0))
    part = kept[10:20]
    del kept
    for number in range(20):
        found = pair.send([large(number), large(number + 0.5)])
        assert found[0][0, 0] == number and found[1][-1, 1] == number + 0.5
        del found
        pair.settle()
    assert torch.equal(part, torch.full((10, 2), 3.0)), "a part holds the whole"
    assert pair.near.num_lent == 1 and pair.there.num_bytes < 6e6
    del part
    pair.settle()
    assert pair.near.num_lent == 0


def test_what_is_kept_for_later_is_bounded_and_forgotten_at_both_ends(pair: Pair) -> None:
    before = descriptors()
    held = [pair.send(torch.zeros(40 * 2**20, dtype=torch.uint8)) for _ in range(8)]
    assert pair.here.num_bytes > MAX_KEPT_BYTES
    held.clear()
    pair.settle()
    pair.send("x")
    pair.settle()
    assert pair.here.num_bytes <= MAX_KEPT_BYTES and pair.there.num_bytes <= MAX_KEPT_BYTES
    pair.close()
    pair.here.clear()
    gc.collect()
    assert pair.here.num_bytes == pair.there.num_bytes == 0 and descriptors() == before - 2


def test_a_tensor_of_one_process_goes_on_to_another_without_a_copy() -> None:
    """As from a stage through the loop to the next stage; it lives as long as the last of them needs it."""
    hub = Segments()
    first, second = Pair(hub), Pair(hub)
    arrived = first.send(large(7.0), back=True)
    made = hub.num_bytes
    on = second.send([arrived[1000:], "and", arrived[:5]])
    assert hub.num_bytes == made, "nothing was copied"
    assert on[0].shape == (99_000, 2) and on[2].tolist() == [[7.0, 7.0]] * 5
    del arrived
    first.settle()
    assert first.far.num_lent == 1, "the last reader still has it"
    first.close()
    assert float(on[0].sum()) == 99_000 * 14.0, "whoever made it may be gone"
    del on
    second.settle()
    gc.collect()
    assert second.near.num_lent == 0 and hub.num_bytes == 0
    second.close()


def test_a_side_that_does_not_read_holds_nobody_up(pair: Pair) -> None:
    for number in range(200):
        pair.near.send({"number": number, "text": "x" * 10_000, "rows": large(number, 5000)})
    assert pair.near.has_unsent
    found: list[Any] = []
    while len(found) < 200:
        found += pair.far.receive()
        pair.near.flush()
    assert [each["number"] for each in found] == [int(each["rows"][0, 0]) for each in found] == list(range(200))


def test_what_cannot_be_sent_leaves_the_connection_as_it_was(pair: Pair) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        pair.near.send([large(), object()])
    with pytest.raises(WireError, match="layout"):
        pair.near.send(torch.eye(3).to_sparse())
    assert pair.send([large(2.0)])[0][0, 0] == 2.0 and pair.near.num_lent == 1


def frame(*parts: Any, files: int = 0) -> bytes:
    content = msgpack.packb(list(parts))
    return HEADER.pack(len(content), files) + content


TENSOR = msgpack.packb([9, 0])
LIES = {
    "a huge length": HEADER.pack(MAX_LENGTH + 1, 0),
    "many descriptors": HEADER.pack(3, 5000),
    "descriptors that did not come": frame([], [], [], [], b"", files=2),
    "noise": HEADER.pack(8, 0) + b"\xdf\xff\xff\xff\xffabc",
    "too few parts": frame([], [], b""),
    "a tensor without an entry": frame([], [], [], [], TENSOR),
    "an entry that is none": frame([3], [], [], [], TENSOR),
    "an unknown dtype": frame([["load", [1], b"x"]], [], [], [], TENSOR),
    "too few bytes": frame([["float32", [4, 4], b"x"]], [], [], [], TENSOR),
    "a huge shape": frame([["float32", [2**40, 2**40], b"x"]], [], [], [], TENSOR),
    "a negative shape": frame([["float32", [-1, -1], b"abcd"]], [], [], [], TENSOR),
    "a segment that is not lent": frame([["float32", [1], 0, 0]], [], [], [], TENSOR),
    "a segment that was not sent": frame([["float32", [1], 0, 0]], [[0, 7, 4096, False]], [], [], TENSOR),
    "a segment without its descriptor": frame([], [[0, 7, 4096, True]], [], [], TENSOR),
    "the return of what was not lent": frame([], [], [5], [], b""),
    "the return of a word": frame([], [], ["x"], [], b""),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES.keys())
def test_lies_are_refused(content: bytes) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(here, Segments(), WireTypes())
    there.sendall(content)
    with pytest.raises(WireError, match="got"):
        connection.receive()
    connection.close()
    there.close()


@pytest.mark.parametrize(("size", "told", "offset"), [(100, 4096, 0), (4096, 4096, 4094), (4096, 4096, -4)])
def test_a_segment_that_is_smaller_than_told_is_refused_and_closed(size: int, told: int, offset: int) -> None:
    before = descriptors()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(here, Segments(), WireTypes())
    file = os.memfd_create("lie")
    os.ftruncate(file, size)
    content = frame([["float32", [1], 0, offset]], [[0, 7, told, True]], [], [], TENSOR, files=1)
    socket.send_fds(there, [content], [file])
    os.close(file)
    with pytest.raises(WireError, match="got"):
        connection.receive()
    connection.close()
    there.close()
    gc.collect()
    assert descriptors() == before


@settings(max_examples=50)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_noise_is_refused_or_waited_for(noise: bytes, num_files: int) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = Connection(here, Segments(), WireTypes())
    there.sendall(HEADER.pack(len(noise), num_files) + noise)
    with contextlib.suppress(WireError):
        connection.receive()
    connection.close()
    there.close()
