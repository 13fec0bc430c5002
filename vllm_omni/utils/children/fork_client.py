"""The fork server as the process sees that uses it: one for all its children, begun with the first."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_omni.utils.children.messages import read_message, write_message
from vllm_omni.utils.processes import heedless_children

ROOT = Path(__file__).resolve().parents[3]  # whose package a child is to import; it begins there
MODULE = "vllm_omni.utils.children.fork_server"
LIBRARIES = frozenset({"diffusers", "transformers", "vllm_omni"})  # that take long, and start no thread when imported
IDLE_S = 60  # without children, after which a server ends
UNREAD = frozenset({"PYTEST_CURRENT_TEST"})  # variables that say nothing to a child, and change all the time


class NotForkedError(Exception):
    """There is no fork server here, or it is gone: the child has to be started afresh."""


class ForkServer:
    """Owns the process, in a thread that waits for its end: on Linux a child dies with the thread that started it."""

    def __init__(self, environment: Mapping[str, str], idle_s: int = IDLE_S) -> None:
        """environment: its own and its children's. idle_s: seconds without children after which it ends."""
        self._environment = dict(environment)
        self._idle_s = idle_s
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._num_children = 0  # that are not reaped
        self._is_left = self.has_ended = False
        threading.Thread(target=self._keep, args=(theirs,), name="omni-fork-server", daemon=True).start()

    def fork(self, module: str, files: Sequence[int], output: int | None, imports: Iterable[str]) -> ForkedChild:
        """NotForkedError where that cannot be."""
        outputs = (1, 2) if output is None else (output, output)
        with self._lock:
            self._num_children += 1
        try:
            sent = [*files, *outputs]
            pid = self._ask({"module": module, "imports": list(imports), "num_files": len(sent)}, sent)["pid"]
            if pid is None:
                raise NotForkedError
        except NotForkedError:
            self._one_less()
            raise
        try:
            return ForkedChild(pid, self)
        except OSError as error:  # no descriptor for it
            os.kill(pid, signal.SIGKILL)
            self.reap(pid)
            raise NotForkedError from error

    def prepare(self, imports: Iterable[str]) -> None:
        """Lets it import them while this process goes on. NotForkedError where it is gone."""
        with self._lock:
            self._send_order({"imports": list(imports)})

    def reap(self, pid: int) -> int:
        """The return code of a child that has ended."""
        try:
            status: int = self._ask({"reap": pid})["status"]
        except NotForkedError:  # its children have ended with it
            status = -signal.SIGKILL
        self._one_less()
        return status

    def leave(self) -> None:
        """It ends when its last child has been reaped."""
        with self._lock:
            self._is_left = True
            self._end_when_left()

    def _one_less(self) -> None:
        with self._lock:
            self._num_children -= 1
            self._end_when_left()

    def _end_when_left(self) -> None:
        if self._is_left and self._num_children == 0:
            self._control.close()

    def _ask(self, order: Mapping[str, Any], files: Sequence[int] | None = None) -> dict[str, Any]:
        with self._lock:
            self._send_order(order, files)
            answer = read_message(self._control)
        if answer is None:
            raise NotForkedError
        return answer

    def _send_order(self, order: Mapping[str, Any], files: Sequence[int] | None = None) -> None:
        try:
            write_message(self._control, order)
            if files is not None:
                self._send(files)
        except OSError as error:
            raise NotForkedError from error

    def _send(self, files: Sequence[int]) -> None:
        """Where one is closed, such as the stdout of a daemon, none: the server answers that it has too few."""
        try:
            socket.send_fds(self._control, [b"f"], files)
        except OSError:
            self._control.sendall(b"f")

    def _keep(self, theirs: socket.socket) -> None:
        with suppress(OSError), theirs:  # no memory for another process
            wait = self._begin(theirs)
            theirs.close()
            wait()
        self.has_ended = True

    def _begin(self, theirs: socket.socket) -> Callable[[], object]:
        """The process; what waits for its end."""
        with heedless_children():
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno()), str(os.getpid()), str(self._idle_s)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=self._environment,
                cwd=ROOT,
            )
        return process.wait


class ForkedChild:
    """A child of the fork server; as of Child."""

    def __init__(self, pid: int, server: ForkServer) -> None:
        self.pid = pid
        self._server = server
        self._file = os.pidfd_open(pid)  # the server reaps none unasked, so it is this one's
        self._status: int | None = None
        self._lock = threading.Lock()  # no signal by a descriptor that is closed

    def kill(self) -> None:
        with self._lock, suppress(ProcessLookupError):
            if self._status is None:
                signal.pidfd_send_signal(self._file, signal.SIGKILL)

    def wait(self, timeout_s: float | None = None) -> bool:
        if self._status is not None:
            return True
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))

    def reap(self) -> int:
        if self._status is None:
            self.wait()
            status = self._server.reap(self.pid)
            with self._lock:
                self._status = status
                os.close(self._file)
        return self._status


_guard = threading.Lock()
_server: ForkServer | None = None
_served: object = None  # the surroundings in which it was begun
_learned: dict[str, None] = {}  # modules, in the order in which a child has imported them


def fork_child(module: str, files: Sequence[int], output: int | None, imports: Sequence[str]) -> ForkedChild:
    """As of `start_child`; NotForkedError where it has to be started in another way."""
    if not can_fork():
        raise NotForkedError
    server = _current_server()
    try:
        return server.fork(module, files, output, [*imports, *_learned])
    except NotForkedError:
        _part_with(server)
        raise


def prepare_children(imports: Iterable[str]) -> None:
    """Begins the fork server where there can be one, ahead of the first child: it imports them meanwhile."""
    if can_fork():
        server = _current_server()
        try:
            server.prepare(imports)
        except NotForkedError:
            _part_with(server)


def learn(modules: Iterable[str]) -> None:
    """What a child has imported: those that are forked later have it. Modules of large libraries alone count."""
    _learned.update((name, None) for name in modules if name.partition(".")[0] in LIBRARIES)


def can_fork() -> bool:
    """Where the system tells of a process's end by a descriptor: on Linux from 5.3 on."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _current_server() -> ForkServer:
    """One that was begun in the surroundings of this moment, which a child is to have from its parent."""
    global _server, _served
    with _guard:
        now = _surroundings()
        if _server is None or _server.has_ended or _served != now:
            if _server is not None:
                _server.leave()
            _server, _served = ForkServer(os.environ), now
        return _server


def _surroundings() -> object:
    variables = {name: value for name, value in os.environ.items() if name not in UNREAD}
    return os.getpid(), sys.executable, variables, os.sched_getaffinity(0)


def _part_with(server: ForkServer) -> None:
    global _server
    with _guard:
        if _server is server:
            _server = None
            server.leave()
