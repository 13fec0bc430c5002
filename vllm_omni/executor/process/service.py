"""What a process that hosts stages does: lets them in, and gives each a turn as long as there are some."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable

from vllm_omni.executor.process.connection import CLOSE_ON_EXEC
from vllm_omni.executor.process.protocol import LogLine
from vllm_omni.executor.process.session import Belongings, Session, ready
from vllm_omni.worker.background import Background


class Service:
    """control: over which the parent sends the connections of its stages, and which it closes behind the last. tell:
    is told whose turn it is, by the number in which the stage has come, 0 being nobody's.
    """

    def __init__(self, control: socket.socket, tell: Callable[[int], None] = lambda number: None) -> None:
        self._control = control
        self._tell = tell
        self._num_let_in = 0
        self._waking, self._wakes = os.pipe()
        os.set_blocking(self._waking, False)
        os.set_blocking(self._wakes, False)
        self._belongings = Belongings(Background(self._wake), self.log)
        self._sessions: list[Session] = []
        self._current: Session | None = None  # whose turn it is
        self._is_left = False  # no other stage will come

    @property
    def num_stages(self) -> int:
        return len(self._sessions)

    def run(self) -> None:
        """Returns when the parent says so or is gone, and all stages are."""
        while self._sessions or not self._is_left:
            is_woken = self._wait()
            for session in self._sessions:
                self._current = session
                self._tell(session.number)
                session.turn(is_woken)
            self._tell(0)
            self._sessions = [session for session in self._sessions if not session.has_ended]
        self._belongings.background.shutdown()

    def log(self, line: LogLine) -> None:
        """From any thread, by the stage whose turn it is."""
        session = self._current
        if session is None or session.has_ended:
            session = next((each for each in self._sessions if not each.has_ended), None)
        if session is not None:
            session.log(line)

    def _wait(self) -> bool:
        """Until some stage has something to do; whether an engine's own work says so."""
        events = dict(session.awaited() for session in self._sessions)
        events[self._waking] = select.POLLIN
        if not self._is_left:
            events[self._control.fileno()] = select.POLLIN
        found = ready(events, wait=not any(session.has_work() for session in self._sessions))
        if not self._is_left and self._control.fileno() in found:
            self._let_in()
        if self._waking not in found:
            return False
        os.read(self._waking, 4096)
        return True

    def _let_in(self) -> None:
        """One more stage, or the word that there will be none."""
        said, files, _, _ = socket.recv_fds(self._control, 1, 1, CLOSE_ON_EXEC)
        if said:
            for file in files:
                self._num_let_in += 1
                self._sessions.append(Session(self._num_let_in, socket.socket(fileno=file), self._belongings))
        else:
            self._is_left = True
            self._control.close()

    def _wake(self) -> None:
        try:
            os.write(self._wakes, b"!")
        except BlockingIOError:
            return
