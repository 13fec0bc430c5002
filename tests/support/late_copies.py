"""Stands in for the copies of a GPU, which run beside what it computes: each is made when somebody waits for it, and
until then its target holds nothing that could be computed with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class LateCopies:
    """On the CPU. Counts what was begun, and how much of it nobody had to wait for from its beginning."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_begun = self.num_marks = 0
        self.ahead: list[bool] = []  # of each wait: whether the copy had been begun before this block was asked for

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> object:
        self.num_marks += 1
        return self.num_marks

    def begin(self, target: Tensor, source: Tensor, after: object) -> object:
        assert after == self.num_marks, "what still computes with the target has not been waited for"
        target.fill_(255)  # NaN in every floating dtype
        self.num_begun += 1
        begun_at, is_done = self.num_marks, False

        def arrive() -> None:
            nonlocal is_done
            if not is_done:
                target.copy_(source)
                self.ahead.append(begun_at < self.num_marks)
                is_done = True

        return arrive

    def wait(self, arrival: object) -> None:
        assert isinstance(arrival, Callable)  # type: ignore[arg-type]
        arrival()
