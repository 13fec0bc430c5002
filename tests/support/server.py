"""A real server in a process of its own, on loopback, for tests of its routes."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any

import httpx
import torch

from vllm_omni.utils.children.fork_client import can_fork

from .forked_program import ForkedProgram
from .loopback import http
from .programs import program_environment

ADDRESS = "vllm-omni: listening on "


class ServerProcess:
    """`vllm-omni serve` with these configs ("tiny_speech", "NAME=path.yaml") and flags, ready when made. A context
    manager that ends it, and shows what it complained of. fresh: `python -m vllm_omni`, not forked. apart: its stages
    have a process, as they do unless told otherwise; without, a server is ready sooner.
    """

    def __init__(
        self,
        configs: Sequence[str],
        flags: Sequence[str] = (),
        *,
        start_s: float = 240.0,
        fresh: bool = False,
        apart: bool = True,
    ) -> None:
        named = [word for config in configs for word in ("--config", config)]
        own = ["serve", "--port", "0", *named, *flags, *([] if apart else ["--in-process"])]
        arguments = ["-m", "vllm_omni", *own]
        environment = program_environment()
        reading, writing = os.pipe()
        self._process: subprocess.Popen[bytes] | ForkedProgram
        if fresh or not can_fork():
            command = [sys.executable, *arguments]
            silent = subprocess.DEVNULL
            self._process = subprocess.Popen(command, env=environment, stdin=silent, stdout=silent, stderr=writing)
        else:
            self._process = ForkedProgram(arguments, environment, writing, writing)
        os.close(writing)
        self._lines: list[str] = []
        self._found: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(os.fdopen(reading, "rb"),), daemon=True).start()
        try:
            self.address = self._address(start_s)
            self._wait_until_ready(start_s)
        except BaseException:
            self.stop()
            raise

    @property
    def base_url(self) -> str:
        """As OpenAI's client wants it."""
        return f"{self.address}/v1"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def errors(self) -> str:
        """What it has written to stderr so far."""
        return "".join(self._lines)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return http.get(self.address + path, timeout=60, **options)

    def requests(self) -> list[dict[str, Any]]:
        """Those that wait or run."""
        return list(self.get("/v1/requests").json()["data"])

    def wait_until_idle(self, timeout_s: float = 30.0) -> float:
        """Until nothing waits or runs, neither at the server nor in its engines; the seconds that took."""
        began_s = time.monotonic()
        while self.requests() or any(
            model["waiting"] or model["running"] for model in self.get("/ready").json()["models"].values()
        ):
            assert time.monotonic() - began_s < timeout_s, self.requests()
            time.sleep(0.02)
        return time.monotonic() - began_s

    def stop(self, timeout_s: float = 60.0) -> int:
        """Ends it as a service manager would; its exit status."""
        self._process.terminate()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit status, once it has ended by itself; it is killed when that takes too long."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            sys.stderr.write(self.errors)

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in (content.decode(errors="replace") for content in stream):
                self._lines.append(line)
                if line.startswith(ADDRESS):
                    self._found.put(line.removeprefix(ADDRESS).strip())
        self._found.put(None)

    def _address(self, timeout_s: float) -> str:
        address = self._found.get(timeout=timeout_s)
        if address is None:
            raise AssertionError(f"the server ended before it listened:\n{self.errors}")
        return address

    def _wait_until_ready(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.get("/ready").status_code != 200:
            assert self._process.poll() is None, f"the server ended while it loaded:\n{self.errors}"
            assert time.monotonic() < deadline_s, f"the server is not ready after {timeout_s:g} s:\n{self.errors}"
            time.sleep(0.1)


@contextmanager
def threads_of_the_server() -> Iterator[None]:
    """torch computes with one thread here too, as it does in the server: with another number sums round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
