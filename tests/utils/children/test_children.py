"""Children, started afresh and forked: what they get, how they end, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.belongings import children, descriptors, is_fork_server

from vllm_omni.utils.children import fork_client
from vllm_omni.utils.children.child import Child, FreshChild, start_child
from vllm_omni.utils.children.fork_client import ForkedChild
from vllm_omni.utils.children.messages import read_message, write_message

MODULE = "support.child_main"
TESTS = Path(__file__).parents[2]
PATIENCE_S = 30.0

pytestmark = pytest.mark.skipif(not fork_client.can_fork(), reason="this system cannot fork them")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(fork_client, "_learned", {})  # a new server would import all that others have been told


@pytest.fixture(params=[True, False], ids=["forked", "fresh"])
def forks(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def start(forks: bool) -> Iterator[Callable[..., tuple[Child, socket.socket]]]:
    """Starts one that does as told; none of them is left."""
    started: list[tuple[Child, socket.socket]] = []

    def start(order: dict[str, Any], **options: Any) -> tuple[Child, socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            child = start_child(MODULE, [theirs.fileno()], forks=forks, **options)
        assert isinstance(child, ForkedChild if forks else FreshChild)
        started.append((child, ours))
        write_message(ours, order)
        return started[-1]

    yield start
    for child, connection in started:
        connection.close()
        child.kill()
        assert child.wait(PATIENCE_S)
        child.reap()


def told(connection: socket.socket) -> dict[str, Any]:
    found = read_message(connection)
    assert found is not None
    return found


def the_fork_server() -> int:
    """Of this process; the newest where there are several. Numbers of processes begin again at the system's largest."""
    tasks = Path("/proc/self/task").glob("*/children")
    found = [int(pid) for task in tasks for pid in task.read_text().split() if is_fork_server(int(pid))]
    return max(found, key=started_at)


def started_at(pid: int) -> int:
    """In ticks since the system's start."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


Start = Callable[..., tuple[Child, socket.socket]]


def test_one_gets_its_descriptor_its_parents_number_and_the_environment(
    start: Start, forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_A_CHILD", "set just now")
    child, connection = start({"do": "tell"})
    about = told(connection)
    assert about["pid"] == child.pid and about["environment"]["OF_A_CHILD"] == "set just now"
    assert about["parent"] == (the_fork_server() if forks else os.getpid())
    assert Path(about["folder"]) == TESTS.parent and child.pid in children()
    assert child.wait(PATIENCE_S) and child.reap() == 0 == child.reap()
    assert child.pid not in children()
    child.kill()  # nothing, also where another has its number by now


def test_what_it_prints_and_why_it_failed_can_be_read(start: Start) -> None:
    for order, words, status in (
        ({"do": "print", "text": "told"}, ["told", "told of errors"], 0),
        ({"do": "raise", "text": "had to"}, ["ValueError: had to"], 1),
    ):
        reading, writing = os.pipe()
        child, _ = start(order, output=writing)
        os.close(writing)
        with os.fdopen(reading) as output:
            printed = output.read()
        assert all(word in printed for word in words) and child.reap() == status


@pytest.mark.parametrize("stopped", [False, True])
def test_it_is_killed_at_once_also_where_it_is_stopped(start: Start, stopped: bool) -> None:
    child, connection = start({"do": "sleep"})
    told(connection)
    assert not child.wait(0.01)
    if stopped:
        os.kill(child.pid, signal.SIGSTOP)
    child.kill()
    assert child.wait(PATIENCE_S) and child.reap() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_program_is_its_parents_from_its_first_moment_on(
    start: Start, number: signal.Signals
) -> None:
    child, connection = start({"do": "tell"})
    os.kill(child.pid, number)  # long before a fresh one could say that it does not heed it
    assert told(connection)["pid"] == child.pid
    assert child.wait(PATIENCE_S) and child.reap() == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}  # those of the parent


def test_how_it_ended_is_told(start: Start) -> None:
    child, _ = start({"do": "exit", "status": 7})
    assert child.reap() == 7


PARENT = """
import socket, sys, time
from vllm_omni.utils.children.child import start_child
from vllm_omni.utils.children.messages import read_message, write_message
ours, theirs = socket.socketpair()
child = start_child("support.child_main", [theirs.fileno()], forks=sys.argv[1] == "True")
write_message(ours, {"do": "sleep"})
read_message(ours)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_it_does_not_outlive_its_parent(forks: bool, stopped: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-c", PARENT, str(forks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if stopped:
            os.kill(child, signal.SIGSTOP)
        parent.kill()
    until(lambda: not Path(f"/proc/{child}").exists())


def tell(*, imports: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a forked child tells that has done so and ended."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start_child(MODULE, [theirs.fileno()], imports=imports)
        assert isinstance(child, ForkedChild)
        write_message(ours, {"do": "tell"})
        about = told(ours)
        assert child.reap() == 0
        return about


@contextmanager
def sleeping() -> Iterator[Child]:
    """A child that sleeps already; the caller ends it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start_child(MODULE, [theirs.fileno()])
        write_message(ours, {"do": "sleep"})
        told(ours)
        yield child


def test_what_one_has_imported_the_next_has_from_its_first_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_NEW", "fork server")
    assert not {"calendar", "vllm_omni.voices"} & set(tell()["modules"])
    fork_client.learn(["vllm_omni.voices", "calendar"])  # which is of no large library
    assert "vllm_omni.voices" in (about := tell(imports=("sched", "no.such.module"))["modules"])
    assert "sched" in about and "calendar" not in fork_client._learned


def test_what_was_prepared_the_first_child_has(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = {"vllm_omni.voices", "concurrent.futures.thread"}  # the latter is imported when it is asked for
    monkeypatch.setenv("A_NEW", "server for this")
    assert not prepared & set(tell()["modules"])
    monkeypatch.setenv("A_NEW", "server that is prepared")
    asked = ["vllm_omni.voices", "concurrent.futures:ThreadPoolExecutor", "no.such:thing", "os:no_such_thing"]
    fork_client.prepare_children(asked)
    server = fork_client._server
    assert prepared <= set((about := tell())["modules"]) and about["parent"] == the_fork_server()
    assert fork_client._server is server


def test_preparing_where_the_fork_server_is_gone_harms_no_child() -> None:
    tell()
    server = fork_client._server
    assert server is not None
    server._control.shutdown(socket.SHUT_RDWR)  # as if it were gone
    fork_client.prepare_children(["sched"])
    assert fork_client._server is not server
    assert tell()["parent"] == the_fork_server()


def test_the_fork_server_has_no_thread_when_it_has_imported_all_that_stages_need() -> None:
    heavy = ("vllm_omni.executor.process.service", "diffusers.models.autoencoders.autoencoder_kl", "av")
    tell(imports=heavy)  # threads of a BLAS that is imported end at the first fork
    about = tell(imports=heavy)
    assert {"torch", "diffusers"} <= set(about["modules"]) and about["parents_threads"] == 1


def test_children_end_with_a_fork_server_that_is_killed_and_another_takes_its_place() -> None:
    with sleeping() as child:
        first = the_fork_server()
        os.kill(first, signal.SIGKILL)
        assert child.wait(PATIENCE_S) and child.reap() == -signal.SIGKILL
    until(lambda: fork_client._server is None or fork_client._server.has_ended)
    assert tell()["parent"] == the_fork_server() != first


def test_a_child_starts_afresh_where_the_fork_server_is_gone_in_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tell()["parent"]
    server = fork_client._server
    assert server is not None
    os.kill(pid, signal.SIGSTOP)  # else it may end, and be known to have, before it is asked
    server._control.shutdown(socket.SHUT_RDWR)  # as if it were gone
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start_child(MODULE, [theirs.fileno()])
        os.kill(pid, signal.SIGCONT)
        write_message(ours, {"do": "tell"})
        assert isinstance(child, FreshChild) and told(ours)["parent"] == os.getpid()
        assert child.reap() == 0
    assert fork_client._server is not server


def test_in_another_environment_there_is_another_and_the_first_stays_while_it_has_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with sleeping() as child:
        first = the_fork_server()
        monkeypatch.setenv("ANOTHER", "one")
        assert tell()["parent"] != first
        assert not child.wait(0.05)
        child.kill()
        assert child.reap() == -signal.SIGKILL
    until(lambda: not Path(f"/proc/{first}").exists())


def test_one_without_children_ends_by_itself_and_asks_for_another() -> None:
    server = fork_client.ForkServer(os.environ, idle_s=0)
    until(lambda: server.has_ended)
    with pytest.raises(fork_client.NotForkedError):
        server.fork(MODULE, [], None, [])
    server.leave()


def test_a_descriptor_that_is_closed_costs_no_other_child_its_server() -> None:
    about = tell()
    server = fork_client._server
    assert server is not None
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    with pytest.raises(fork_client.NotForkedError):
        server.fork(MODULE, [writing], None, [])
    assert tell()["parent"] == about["parent"]


def test_nothing_is_left_of_a_child() -> None:
    tell()
    before = descriptors(), children(), threading.active_count()
    for _ in range(3):
        tell()
    assert (descriptors(), children(), threading.active_count()) == before
