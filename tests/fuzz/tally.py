"""Runs one input after another and counts what became of them. Knows no kind of input."""

from __future__ import annotations

import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import FrameType

from vllm_omni.errors import OmniError

HANG_S = 30.0
MOST_GROWTH = 256 * 2**20  # bytes that one input may add to the peak of the process


class Hang(BaseException):
    """An input took longer than it may."""


@dataclass
class Tally:
    """The outcomes of a run. `faults` are what should never be: (what, the input's number, the last lines)."""

    name: str
    seed: int
    limit_s: float = HANG_S  # of one input
    num_inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, int, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: int = 0
    first_peak: int = 0
    peak: int = 0

    def run(self, case: Callable[[Random], str], *, seconds: float, first: int = 0, most: int | None = None) -> Tally:
        """case: one input; its word for what happened. An OmniError is a refusal, anything else a fault."""
        end = time.monotonic() + seconds
        self.first_peak = self.peak = peak_bytes()
        while time.monotonic() < end and (most is None or self.num_inputs < most):
            self._one(case, first + self.num_inputs)
            self.num_inputs += 1
        return self

    def _one(self, case: Callable[[Random], str], index: int) -> None:
        started = time.monotonic()
        try:
            with time_limit(self.limit_s):
                outcome = case(Random(f"{self.seed} {index}"))
        except OmniError as error:
            outcome = f"refused: {type(error).__name__}"
            str(error).encode("utf-8")
        except Hang:
            outcome = "hang"
            self._note("hang", index)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            outcome = "crash"
            self._note("crash", index)
        self.outcomes[outcome] += 1
        took, peak = time.monotonic() - started, peak_bytes()
        if took > self.slowest_s:
            self.slowest_s, self.slowest = took, index
        if peak - self.peak > MOST_GROWTH and index > 5:  # the first ones load libraries
            self.faults.append(("memory", index, f"{(peak - self.peak) >> 20} MiB more"))
        self.peak = peak

    def _note(self, what: str, index: int) -> None:
        lines = traceback.format_exc().splitlines()[-8:]
        self.faults.append((what, index, "".join(f"{line[:300]}\n" for line in lines)))

    def report(self) -> str:
        """Inputs, crashes, hangs and peak memory, then every fault with what repeats it."""
        kinds = Counter(what for what, _, _ in self.faults)
        lines = [
            f"{self.name}: {self.num_inputs} inputs, {kinds['crash']} crashes, {kinds['hang']} hangs, "
            f"{kinds['memory']} of much memory, peak {self.peak >> 20} MiB ({self.first_peak >> 20} before), "
            f"slowest {self.slowest_s:.1f} s (number {self.slowest}), seed {self.seed}",
            *(f"    {count} {outcome}" for outcome, count in self.outcomes.most_common()),
        ]
        for what, index, words in self.faults[:20]:
            lines += [f"{what} at number {index} (--seed {self.seed} --first {index} --most 1):", words]
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hang in the main thread; nothing in another."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def limit_memory(more: int) -> None:
    """Allows so many bytes more than now, so that a fault ends here and not with the machine."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))
