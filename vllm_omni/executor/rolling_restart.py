"""Restarts the replicas of a stage one after another, each once its tasks have finished. Owns none of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vllm_omni.executor.stage_host import StageHost


class RollingRestart:
    """At rest until `begin`. The replica whose turn it is (`replica`) is to be given no tasks."""

    def __init__(self, hosts: Sequence[StageHost]) -> None:
        self._hosts = hosts
        self._waiting: deque[int] = deque()
        self._is_begun = False  # the one whose turn it is has let go of its engine
        self.replica: int | None = None

    @property
    def num_left(self) -> int:
        """How many have yet to be ready again; from any thread."""
        return len(self._waiting) + (self.replica is not None)

    def begin(self) -> None:
        """All of them, those included that have had their turn."""
        self._waiting = deque(number for number in range(len(self._hosts)) if number != self.replica)

    def go_on(self) -> int | None:
        """Does what can be done now; the replica that has let go of its engine by that."""
        if self.replica is None and self._waiting:
            self.replica, self._is_begun = self._waiting.popleft(), False
        if self.replica is None:
            return None
        host = self._hosts[self.replica]
        if self._is_begun:
            if host.is_ready:
                self.replica = None
            return None
        if host.tasks or not host.is_ready:  # one that is being rebuilt is restarted when that is over
            return None
        host.restart()
        self._is_begun = True
        return self.replica
