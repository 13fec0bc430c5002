"""The process of a stage, in this one: what it makes of descriptors, whatever their numbers."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_omni.executor.process.connection import Connection
from vllm_omni.executor.process.keeper import Keeper
from vllm_omni.executor.process.protocol import LogLine, wire_types
from vllm_omni.executor.process.segments import Segments
from vllm_omni.executor.process.service import Service

FIRST_LARGE = 1024  # which `select` does not know
PATIENCE_S = 30.0


@pytest.fixture
def large_numbers() -> Iterator[int]:
    """The first of numbers that descriptors may have, beyond what they mostly are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * FIRST_LARGE
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip("this machine allows so many descriptors to nobody")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if soft == resource.RLIM_INFINITY else max(soft, wanted), hard))
    yield FIRST_LARGE
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def socketpair(least: int) -> tuple[socket.socket, socket.socket]:
    """The other side with such a large number."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        return ours, socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, least))


def test_descriptors_have_large_numbers_where_the_parent_has_many(large_numbers: int) -> None:
    """Of a server, for example: its children have the ends of their connections under the same numbers."""
    control, its_control = socketpair(large_numbers)
    ours, theirs = socketpair(large_numbers)
    service = Service(its_control)
    parent = Connection(ours, Segments(), wire_types())
    socket.send_fds(control, [b"+"], [theirs.fileno()])
    theirs.close()
    running = threading.Thread(target=service.run, daemon=True)
    running.start()
    told = [LogLine("vllm_omni", 20, "x" * 1_000_000) for _ in range(4)]  # more than a socket holds
    until = time.monotonic() + PATIENCE_S
    while not service.num_stages and time.monotonic() < until:
        time.sleep(0.001)
    telling = threading.Thread(target=lambda: [service.log(line) for line in told], daemon=True)
    telling.start()
    heard: list[object] = []
    while len(heard) < len(told) and time.monotonic() < until:
        heard += parent.receive()
        time.sleep(0.001)
    assert len(heard) == len(told)
    running.join(0.2)
    assert running.is_alive(), "it waits for its first message"
    parent.close()
    while service.num_stages and time.monotonic() < until:
        time.sleep(0.001)
    running.join(0.2)
    assert running.is_alive(), "another stage may come"
    control.close()
    running.join(PATIENCE_S)
    assert not running.is_alive()
    os.close(service._waking)
    os.close(service._wakes)


def test_what_a_process_writes_is_read_also_where_our_stderr_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open("w") as ours:
        monkeypatch.setattr(sys, "__stderr__", ours)
    keeper = Keeper("none", [], lambda: None)  # without its descriptors it says what it misses, and ends
    assert keeper.wait(PATIENCE_S)
    assert "not enough values to unpack" in keeper.end()
