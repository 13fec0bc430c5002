"""The time to the first token of a request that is alone, by several ways to ask for it, in turn.

What a client of Python takes of its own beside the server's work depends on its library; a plain socket shows what the
server adds, as a client that is compiled sees it.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.measure import Options, Table, median, with_spread
from vllm_omni.entrypoints.bench.mix import ROUTES, BenchRequest

CONTENT = b'"content":"'  # of an event with words
END = b"\r\n0\r\n\r\n"  # of an answer in chunks
TIMEOUT_S = 60.0  # without a byte, as after an error, which does not come in chunks


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Seconds by way, turn by turn; `offline` is the way without HTTP."""

    seconds: Mapping[str, Sequence[float]]
    offline: str

    def added_s(self, way: str) -> list[float]:
        return [over - without for over, without in zip(self.seconds[way], self.seconds[self.offline], strict=True)]

    def table(self) -> Table:
        ways = [way for way in self.seconds if way != self.offline]
        rows = [[f"words alone, {way}", *map(_ms, self._sides(way))] for way in ways]
        return Table("Time to the first token, ms", ("case", "HTTP", "offline", "HTTP adds"), rows)

    def _sides(self, way: str) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        return self.seconds[way], self.seconds[self.offline], self.added_s(way)


def first_tokens(ways: Mapping[str, Callable[[], float]], offline: str, options: Options) -> FirstTokens:
    """One untimed turn, then timed ones; every way is the first of a turn in turn, as a machine's speed drifts."""
    names = list(ways)
    turns: list[dict[str, float]] = []
    began_s = time.perf_counter()
    while not turns or not options.is_enough(len(turns) - 1, time.perf_counter() - began_s):
        names.append(names.pop(0))
        turns.append({name: ways[name]() for name in names})
    return FirstTokens({way: [turn[way] for turn in turns[1:]] for way in ways}, offline)


def over_socket(address: str, requests: Sequence[BenchRequest]) -> float:
    """Seconds, the median of the requests, over one connection."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname or "", place.port or 80), TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return median([_ask(connection, request) for request in requests])


def _ask(connection: socket.socket, request: BenchRequest) -> float:
    body = json.dumps({**request.body, "stream": True}).encode()
    head = f"POST {ROUTES[request.kind]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    began_s = time.perf_counter()
    connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    found, first_s = b"", None
    while not found.endswith(END):
        found += connection.recv(65_536) or END  # which nothing follows
        if first_s is None and CONTENT in found:
            first_s = time.perf_counter() - began_s
    if first_s is None:
        raise RuntimeError(f"an answer without words: {found[:300]!r}")
    return first_s


def _ms(seconds: Sequence[float]) -> str:
    return with_spread([each * 1000 for each in seconds])
