"""The processes that host stages, as the executors of one loop see them: each begins with its first stage, lets others
of the same name in, and ends with the last.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from vllm_omni.executor.homes import Home
from vllm_omni.executor.process.keeper import Keeper
from vllm_omni.executor.process.pulse import NUM_BYTES, Pulse
from vllm_omni.executor.process.segments import create_memory
from vllm_omni.utils.processes import is_stopped

LEAVE_S = 5.0  # the most that is waited for a process to free its engines and end
KILL_S = 2.0  # ... for one that was killed
STOPPED_S = 0.5  # without a sign of life, after which one that is stopped counts as hanging
SILENT_S = 10.0  # ... after which any does; on a machine that is busy threads wait for each other
IMPORT_S = 60.0  # ... while it loads, when large libraries are read from a slow disk
LOOK_S = 0.1  # between two looks at it


class Host:
    """One such process. `Hosts` starts and ends it."""

    def __init__(self, name: str, on_end: Callable[[], None], imports: Sequence[str] | None) -> None:
        """name: of the thread that keeps it. on_end: called in that thread. imports: as of Keeper."""
        self.num_stages = 0
        self.is_left = False  # nobody else is let in
        self._num_connected = 0
        self._why_killed: str | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        memory = create_memory(NUM_BYTES)
        self._pulse = Pulse(memory)
        self._keeper = Keeper(name, [theirs.detach(), memory], on_end, imports)
        self._started_s = time.monotonic()
        self._looked_s = 0.0

    @property
    def pid(self) -> int | None:
        """None before it is started."""
        return self._keeper.pid

    @property
    def has_ended(self) -> bool:
        return self._keeper.has_ended

    def connect(self) -> tuple[int, socket.socket]:
        """Our end of a connection for one more stage, and its number; also before the process has started."""
        self._num_connected += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs, suppress(OSError):  # of one that has ended, which will be said of it
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        return self._num_connected, ours

    def is_turn_of(self, number: int) -> bool:
        """Whether the stage of that number is at work there, or was when the process ended."""
        return self._pulse.turn == number

    def is_turn_of_another(self, number: int) -> bool:
        return self._pulse.turn not in (0, number)

    def end(self) -> str:
        """How it ended."""
        return self._why_killed or self._keeper.end()

    def trouble(self, is_loading: bool) -> str | None:
        """In what state it is if not alive and at work, as far as it shows; looked at now and then."""
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return None
        self._looked_s = now
        silent_s = min(self._pulse.silent_s(), now - self._started_s)
        if silent_s > STOPPED_S and self.pid is not None and is_stopped(self.pid):
            return f"was stopped, and gave no sign of life for {silent_s:.1f} s"
        if silent_s > (IMPORT_S if is_loading else SILENT_S):
            return f"gave no sign of life for {silent_s:.1f} s"
        return None

    def dismiss(self, *, wait: bool) -> None:
        """It ends when its stages are gone; at once where that is not waited for, or takes too long."""
        self.is_left = True
        self._control.close()
        if not wait or not self._keeper.wait(LEAVE_S):
            self.kill(wait=wait)

    def kill(self, *, wait: bool, why: str | None = None) -> None:
        """It ends at once, with all its stages. why: how `end` is to call that."""
        self.is_left = True
        if not self.has_ended:
            self._why_killed = self._why_killed or why
        self._keeper.kill()
        if wait:
            self._keeper.wait(KILL_S)

    def close(self) -> None:
        """When no stage asks about it any more."""
        self._control.close()
        self._pulse.close()


class Hosts:
    """Those of one loop."""

    def __init__(self) -> None:
        self._at_home: dict[Home, Host] = {}
        self._lock = threading.Lock()

    def join(self, home: Home, on_end: Callable[[], None], imports: Sequence[str] | None) -> Host:
        """The process for one more stage, that of the others of its home. The rest: as of Host."""
        with self._lock:
            host = self._at_home.get(home)
            if host is None or host.is_left or host.has_ended:
                _, name, _ = home
                host = self._at_home[home] = Host(name, on_end, imports)
            host.num_stages += 1
            return host

    def leave(self, host: Host, *, wait: bool, kill: str | None) -> None:
        """A stage that had joined is gone: the last one ends the process. wait: for the end. kill: why the others have
        to end with it.
        """
        with self._lock:
            host.num_stages -= 1
            is_last = host.num_stages == 0
            if is_last:
                self._at_home = {home: each for home, each in self._at_home.items() if each is not host}
        if kill is not None:
            host.kill(wait=wait, why=kill)
        elif is_last:
            host.dismiss(wait=wait)
        if is_last:
            host.close()
