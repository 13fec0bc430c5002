"""Graphs that replay by calling what they have captured, as CUDA graphs are used where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero", "equal")


class NoReading(TorchDispatchMode):
    """Fails where a number is asked of the device, which no graph can hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in READS, f"{name} asks the device for a number"
        return func(*args, **(kwargs or {}))


class CalledGraphs:
    """Keeps what it has captured, in order, and counts how often it replays. is_strict: whether captured work must ask
    the device for no number.
    """

    def __init__(self, *, is_strict: bool = True) -> None:
        self._is_strict = is_strict
        self.num_captured = self.num_replayed = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        if self._is_strict:
            with NoReading():
                work()
        else:
            work()

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay
