"""Two sides of a comparison, each in a process of its own, asked in turn: us, peer, us, peer.

So each has its own peak memory and its own state, and a disturbance of the machine hits both alike. Loading is not
timed here; a time is taken inside the side's process, around the work alone.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

from benchmarks.measure import Options, median, peak_memory_mb, with_spread


class Side(Protocol):
    """What runs in the other process: made there from picklable arguments."""

    def run(self, case: Any, repeat: int) -> Any:
        """Does the work of a case once; `repeat` varies what must not be answered from a cache."""


class SideError(RuntimeError):
    """A side failed; carries its traceback."""


class SideProcess:
    """A side in a fresh process; a context manager that ends it."""

    def __init__(self, name: str, threads: int, make: Callable[..., Any], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, make, arguments), daemon=True)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read while the new process imports torch
        self._process.start()
        theirs.close()
        self._is_ready = False

    def call(self, method: str, *arguments: Any) -> tuple[float, Any]:
        """(seconds inside the process, result) of one method."""
        if not self._is_ready:
            self._receive()
            self._is_ready = True
        self._connection.send((method, arguments))
        seconds, result = self._receive()
        return float(seconds), result

    def peak_memory_mb(self) -> float:
        return float(self.call("peak_memory_mb")[1])

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._process.is_alive():
            self._connection.send(None)
            self._process.join(30)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            failure, answer = self._connection.recv()
        except EOFError:
            raise SideError(f"{self.name}: the process died") from None
        if failure is not None:
            raise SideError(f"{self.name}: {failure}")
        return answer


def _serve(connection: Connection, threads: int, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """The other process: builds the side, then answers calls until it is told to end."""
    import torch

    torch.set_num_threads(threads)
    try:
        side = make(*arguments)
        connection.send((None, None))
        while (call := connection.recv()) is not None:
            connection.send((None, _timed(side, *call)))
    except Exception:
        connection.send((traceback.format_exc(), None))


def _timed(side: Any, method: str, arguments: Sequence[Any]) -> tuple[float, Any]:
    if method == "peak_memory_mb":
        return 0.0, peak_memory_mb()
    started = time.perf_counter()
    result = getattr(side, method)(*arguments)
    return time.perf_counter() - started, result


@dataclass(slots=True)
class Duel:
    """The times of both sides in one case. amount: how many units (pictures, tokens) one run makes. agreement: what
    was found when the answers were compared.
    """

    case: str
    amount: float
    us_s: list[float] = field(default_factory=list)
    peer_s: list[float] = field(default_factory=list)
    agreement: str = ""

    @property
    def ratios(self) -> list[float]:
        """How many times as fast we are, run by run."""
        return [peer / us for us, peer in zip(self.us_s, self.peer_s, strict=True)]

    def cells(self) -> list[str]:
        """case | our rate | the peer's rate | ratio | agreement."""
        rates = [with_spread([self.amount / seconds for seconds in side]) for side in (self.us_s, self.peer_s)]
        return [self.case, *rates, with_spread(self.ratios), self.agreement]

    def figures(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "amount": self.amount,
            "us_s": self.us_s,
            "peer_s": self.peer_s,
            "ratio": median(self.ratios),
            "agreement": self.agreement,
        }


class Asked(Protocol):
    """A side that is asked from this process, wherever it runs."""

    name: str

    def call(self, method: str, *arguments: Any) -> tuple[float, Any]:
        """(seconds, result) of one of its methods."""


def run(side: Asked, case: Any, repeat: int) -> tuple[float, Any]:
    return side.call("run", case, repeat)


def rounds(
    us: Asked,
    peers: Sequence[Asked],
    cases: Iterable[tuple[str, float, Any]],
    compare: Callable[[Any, Any], str],
    options: Options,
    ask: Callable[[Asked, Any, int], tuple[float, Any]] = run,
) -> Iterator[list[Duel]]:
    """Of every (name, amount, case) a duel with each peer: one warm-up of each side, whose answers are compared, then
    timed runs in turn: us, the first peer, the next.
    """
    for name, amount, case in cases:
        found = [Duel(name, amount) for _ in peers]
        ours = ask(us, case, 0)[1]
        for peer, duel in zip(peers, found, strict=True):
            duel.agreement = compare(ours, ask(peer, case, 0)[1])
        done, spent_s = 0, 0.0
        while not options.is_enough(done, spent_s):
            done += 1
            us_s = ask(us, case, done)[0]
            peers_s = [ask(peer, case, done)[0] for peer in peers]
            for peer_s, duel in zip(peers_s, found, strict=True):
                duel.us_s.append(us_s)
                duel.peer_s.append(peer_s)
            spent_s += us_s + sum(peers_s)
        yield found


def duels(
    us: Asked,
    peer: Asked,
    cases: Iterable[tuple[str, float, Any]],
    compare: Callable[[Any, Any], str],
    options: Options,
) -> list[Duel]:
    """As `rounds` with one peer, each told when it has ended."""
    found = []
    for row in rounds(us, [peer], cases, compare, options):
        tell([peer.name], row)
        found += row
    return found


def tell(peers: Sequence[str], row: Sequence[Duel]) -> None:
    """One case, when it has ended: some suites take half an hour on a slow machine."""
    told = ", ".join(f"{with_spread(duel.ratios)} times {name}" for name, duel in zip(peers, row, strict=True))
    print(f"{row[0].case}: {told}", file=sys.stderr, flush=True)
