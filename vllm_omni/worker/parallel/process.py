"""The process of one follower as its first rank sees it: started with one end of a socket pair, which nobody else can
reach; over it the follower is told what it is, says that it is loaded, and leaves its last words.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_omni.utils.children.child import start_child
from vllm_omni.utils.children.messages import write_message
from vllm_omni.utils.device import is_cpu
from vllm_omni.utils.processes import end_in_words, is_stopped

MODULE = "vllm_omni.worker.parallel.follower"
READY, FAILED = "ready", "failed"


class FollowerProcess:
    """Started when it is made, from a thread that lives as long as it: the system kills it when that ends."""

    def __init__(self, rank: int, orders: Mapping[str, Any]) -> None:
        self.rank = rank
        self.socket, theirs = socket.socketpair()
        with theirs:
            forks = is_cpu(torch.device(orders["device"]))
            self._child = start_child(MODULE, [theirs.fileno()], forks=forks)
        write_message(self.socket, {**orders, "folder": str(Path.cwd()), "sys_path": [str(path) for path in sys.path]})

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return is_stopped(self.pid)

    def end(self) -> str:
        """Kills it, where it still runs; how it ended, in words."""
        if not self._child.wait(0):
            self._child.kill()
        self._child.wait()
        status = self._child.reap()
        self.socket.close()
        return end_in_words(status)

    def wait_for_end(self, wait_s: float) -> str:
        """As `end`, of one that has closed its socket and gets a moment to end by itself."""
        self._child.wait(wait_s)
        return self.end()
