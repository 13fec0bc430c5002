"""Python programs in processes that are forked where torch, diffusers and the server are imported already: they are the
same programs, but for the ten seconds that their imports take of a slow core. So are the fork servers of their own
children, which would take them once more.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_omni.utils.children import fork_client, fork_server
from vllm_omni.utils.children.fork_client import ForkServer
from vllm_omni.utils.children.messages import read_message, write_message
from vllm_omni.utils.processes import die_with, heedless_children

from .belongings import forked_server_name

MODULE = "support.forked_program"  # where the tests are on the path, as they are for the program
PR_SET_NAME = 15
IMPORTS = (
    "vllm_omni.entrypoints.cli.app",
    "vllm_omni.entrypoints.server.app",
    "vllm_omni.entrypoints.async_omni",
    "vllm_omni.engine.ar.spec",
    "vllm_omni.engine.diffusion.spec",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "uvicorn",
)


class ForkedProgram:
    """`python` with these arguments, which begin with `-m` or `-c`, and this environment. As of Popen."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], output: int, errors: int) -> None:
        """output, errors: descriptors of what it prints."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server = _fork_server(frozenset(_lasting(environment).items()))
            self._child = server.fork(MODULE, [theirs.fileno(), errors], output, IMPORTS)
            order = {"arguments": list(arguments), "environment": dict(environment)}
            write_message(ours, {**order, "folder": str(Path.cwd())})
            read_message(ours)
        self.pid = self._child.pid

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        self._child.kill()

    def poll(self) -> int | None:
        return self._child.reap() if self._child.wait(0) else None

    def wait(self, timeout_s: float | None = None) -> int:
        if not self._child.wait(timeout_s):
            raise subprocess.TimeoutExpired("python", timeout_s or 0.0)
        return self._child.reap()


class _ForkedServer(ForkServer):
    """One that has imported what this process has, which waits meanwhile: it is to hold no lock."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._has_begun = threading.Event()
        super().__init__(environment)
        self._has_begun.wait()

    def _begin(self, theirs: socket.socket) -> Callable[[], object]:
        parent = os.getpid()
        with heedless_children():
            server = os.fork()
        if server == 0:
            self._control.close()
            libc: Any = ctypes.CDLL(None)
            libc.prctl(PR_SET_NAME, forked_server_name(os.getpid()).encode())
            fork_server.main([str(theirs.fileno()), str(parent), str(self._idle_s)])
            os._exit(0)
        self._has_begun.set()
        return lambda: os.waitpid(server, 0)


def _lasting(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}


@lru_cache(2)
def _fork_server(environment: frozenset[tuple[str, str]]) -> ForkServer:
    """One for each environment, since libraries look into it when they are imported."""
    return ForkServer(dict(environment), idle_s=7200)


def main(arguments: list[str]) -> None:
    """In the forked process."""
    file, errors, parent = map(int, arguments)
    die_with(parent)
    os.dup2(errors, 2)
    os.close(errors)
    with socket.socket(fileno=file) as connection:
        order = read_message(connection)
        assert order is not None
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [order["folder"], *(folder for folder in path if folder)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # no child's
        kind, program, *words = order["arguments"]
        sys.argv[:] = [program if kind == "-m" else kind, *words]
        fork_client._server, fork_client._served = _ForkedServer(os.environ), fork_client._surroundings()
        write_message(connection, {"runs": True})
    status: object = 0
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
