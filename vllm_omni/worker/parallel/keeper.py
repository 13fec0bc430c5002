"""Starts the followers of a group and watches them, in a thread of its own: one that ends takes the others with it, and
the cause is kept. Knows no model.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_omni.utils.children.messages import read_message
from vllm_omni.worker.parallel.process import FAILED, READY, FollowerProcess

LAST_MOMENT_S = 1.0  # that one has to end by itself after it has closed its socket


class Keeper:
    """Owns the processes. They are children of its thread, which lives as long as they do."""

    def __init__(self, orders: Sequence[Mapping[str, Any]], on_end: Callable[[], None]) -> None:
        """orders: of every follower, from rank 1 on. on_end: called in the thread when the group has ended unasked."""
        self.cause: str | None = None  # why the group has ended, unless it was asked to
        self._orders = orders
        self._on_end = on_end
        self._followers: list[FollowerProcess] = []
        self._waiting = set(range(1, len(orders) + 1))  # ranks that have not said that they are loaded
        self._changed = threading.Condition()
        self._has_ended = False
        self._pipe: tuple[int, ...] = os.pipe()
        self._wake_out, self._wake_in = self._pipe
        self._thread = threading.Thread(target=self._main, name="omni-followers", daemon=True)
        self._thread.start()

    def wait_loaded(self) -> bool:
        """Whether all are loaded; waits until they are, or the group has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or not self._waiting)
            return not self._has_ended

    def wait_ended(self, wait_s: float) -> bool:
        """Whether the group has ended, after so long at most."""
        with self._changed:
            return self._changed.wait_for(lambda: self._has_ended, wait_s)

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    @property
    def stopped_ranks(self) -> list[int]:
        """Those that a signal has stopped."""
        return [follower.rank for follower in self._followers if follower.is_stopped]

    @property
    def pids(self) -> list[int]:
        return [follower.pid for follower in self._followers]

    def end(self) -> None:
        """Kills them all and waits for that; may be called twice."""
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            os.write(self._wake_in, b"!")
            self._thread.join()
        for descriptor in self._pipe:
            os.close(descriptor)
        self._pipe = ()

    def _main(self) -> None:
        try:
            for index, orders in enumerate(self._orders, start=1):
                self._followers.append(FollowerProcess(index, orders))
            self._watch()
        except Exception as error:  # such as a process that cannot be started
            self.cause = self.cause or f"{type(error).__name__}: {error}"
        finally:
            for follower in self._followers:
                follower.end()
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()
            if self.cause is not None:
                self._on_end()

    def _watch(self) -> None:
        followers = {follower.socket.fileno(): follower for follower in self._followers}
        watched = select.poll()
        for descriptor in (self._wake_out, *followers):
            watched.register(descriptor, select.POLLIN)
        while True:
            readable = [descriptor for descriptor, _ in watched.poll()]
            if self._wake_out in readable:
                return
            for descriptor in readable:
                follower = followers[descriptor]
                message = read_message(follower.socket)
                if message is None or message.get("event") != READY:
                    self.cause = self._cause(follower, message)
                    return
                with self._changed:
                    self._waiting.discard(follower.rank)
                    self._changed.notify_all()

    def _cause(self, follower: FollowerProcess, message: Mapping[str, Any] | None) -> str:
        name = f"rank {follower.rank} of {len(self._orders) + 1}"
        if message is not None and message.get("event") == FAILED:
            return f"{name} failed: {message.get('cause')}"
        return f"{name} {follower.wait_for_end(LAST_MOMENT_S)}"
