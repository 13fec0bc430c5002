"""A training that ends by the clock: the share of time that is gone, learning rates by it, a log for people."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from torch import Tensor

LOG_EVERY_S, WARMUP_STEPS = 5.0, 100


class Clock:
    """seconds: how long. name: of the part, in the log."""

    def __init__(self, name: str, seconds: float, log: Path) -> None:
        self.name, self.seconds, self.step = name, seconds, 0
        self._log = log
        self._started = self._logged = time.perf_counter()

    @property
    def share(self) -> float:
        """Of the time, that is gone: 0 to 1."""
        return min(1.0, (time.perf_counter() - self._started) / self.seconds)

    def rate(self, highest: float) -> float:
        """Linear warm-up by steps, then a cosine by time."""
        return highest * min(1.0, (self.step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * self.share))

    def tick(self, **values: Tensor) -> None:
        """A step is done; values: for the log."""
        self.step += 1
        if self.step == 1 or time.perf_counter() - self._logged > LOG_EVERY_S:
            self.write(**values)

    def write(self, **values: Tensor | float) -> None:
        self._logged = time.perf_counter()
        line = {"part": self.name, "step": self.step, "seconds": round(self._logged - self._started, 1)}
        line |= {name: round(float(value), 5) for name, value in values.items()}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(" ".join(f"{name}={value}" for name, value in line.items()), flush=True)
