"""What HTTP costs: the same requests of a server and of the graph in a process without one, in turn; and how the
server bears a crowd. One thread for each model, as all of it shares the cores with the clients.

Without a server pictures and sounds end as `PIL.Image` and samples. Over HTTP they are encoded as well, previews too:
that is a part of what HTTP adds here, though whoever saves a picture encodes it either way. So is the client, which
takes its time from the same cores; what of the CPU's time is the server's and what the client's is told beside it.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.first_token import FirstTokens, first_tokens, over_socket
from benchmarks.limits import Limits, decode_parameters
from benchmarks.measure import ROOT, Options, Report, Table, median, with_spread
from benchmarks.sides import SideProcess
from benchmarks.text import MIDDLE, SMALL, ModelMaker
from tests.support.server import ServerProcess
from vllm_omni.entrypoints.bench.answer import Answer
from vllm_omni.entrypoints.bench.http_target import HttpTarget
from vllm_omni.entrypoints.bench.load import Load, Run
from vllm_omni.entrypoints.bench.mix import BenchRequest, Mix

CONFIG = "tiny_omni"
MIX = ROOT / "benchmarks" / "mixes" / "omni.yaml"
WORDS = Mix.of({"works": {"words": {"kind": "chat", "prompts": ["hello there"], "body": {"modalities": ["text"]}}}})
THREADS = 1
CONCURRENCY = 16
SOCKET, CLIENT, OFFLINE = "a plain socket", "the client of `vllm-omni bench`", "offline"  # ways to a first token
PICTURES = Mix.of(
    {"works": {"picture": {"kind": "image", "prompts": ["a red circle"], "body": {"num_inference_steps": 30}}}}
)
RUNNING, QUEUE = 2, 4  # of the server that is asked for more
PAUSE_S = 0.02  # between two looks at /health and /metrics
TIMEOUT_S = 600.0
DTYPE, WRITERS = "bfloat16", 8  # of the language model
# whatever it would write, so many tokens
TEXTS = Mix.of(
    {
        "works": {
            f"{new} tokens": {
                "kind": "completion",
                "prompts": [" ".join(f"w{start + index}" for index in range(length)) for start in (100, 200)],
                "body": {"max_tokens": new, "temperature": 0, "ignore_eos": True},
            }
            for new, length in ((32, 17), (48, 64), (64, 33))
        }
    }
)


def run(options: Options, limits: Limits | None = None) -> Report:
    count = 6 if options.is_quick else 60
    crowd = 12 if options.is_quick else 200
    mixed, words = Mix.read(MIX).draw(count, 0), WORDS.draw(count, 0)
    texts = language_model(options)
    with ServerProcess([CONFIG], fresh=True) as server, SideProcess("offline", THREADS, OfflineSide, CONFIG) as offline:
        work = Overhead(f"tiny models, {count} mixed requests, {CONCURRENCY} at a time", count)
        work.pairs = _in_turn(server, offline, mixed, CONCURRENCY, options)
        ways: dict[str, Callable[[], float]] = {
            SOCKET: partial(over_socket, server.address, words),
            CLIENT: lambda: _first_token_s(_over_http(server, words, 1)),
            OFFLINE: lambda: _first_token_s(offline.call("run", words, 1)[1][0]),
        }
        first = first_tokens(ways, OFFLINE, options)
        storm, watch = _storm(server, Mix.read(MIX).draw(crowd, 1))
    few = ["--set", f"scheduler.max_running={RUNNING}", "--set", f"scheduler.max_queue_size={QUEUE}"]
    with ServerProcess(["tiny_image"], few, fresh=True) as server:
        refused = _storm(server, PICTURES.draw(crowd, 0))[0]
    return Report(
        "serving",
        [
            _work_table([work, texts]),
            _cpu_table([work, texts]),
            first.table(),
            _storm_table(storm, watch),
            _refusal_table(refused),
        ],
        notes=[work.note(), texts.note()],
        figures=_figures(work, texts, first, storm, watch, refused),
    )


def language_model(options: Options) -> Overhead:
    """Of a random Qwen3 of a size that such a machine serves; its prompts are known, so that writing is the work."""
    shape = SMALL if options.is_quick else MIDDLE
    count = 4 if options.is_quick else 24
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("model maker", THREADS, ModelMaker) as maker:
            maker.call("make", Path(folder), shape, DTYPE)
        size = f"{decode_parameters(shape) / 1e6:.0f} M"
        found = Overhead(f"a language model of {size} ({DTYPE}), {count} texts, {WRITERS} at a time", count)
        with (
            ServerProcess([], ["--model", folder, "--set", f"text.dtype={DTYPE}"], fresh=True) as server,
            SideProcess("offline", THREADS, OfflineSide, None, folder, (f"text.dtype={DTYPE}",)) as offline,
        ):
            found.pairs = _in_turn(server, offline, TEXTS.draw(count, 0), WRITERS, options)
    return found


class OfflineSide:
    """The graph without a server, in a process of its own."""

    def __init__(self, config: str | None, model: str | None = None, overrides: Sequence[str] = ()) -> None:
        from vllm_omni.entrypoints.bench.offline_target import OfflineTarget
        from vllm_omni.entrypoints.loading import open_pipeline

        self._loop = asyncio.new_event_loop()
        self._target = OfflineTarget(open_pipeline(config, model=model, overrides=overrides), ())
        self._loop.run_until_complete(self._target.__aenter__())

    def run(self, requests: Sequence[BenchRequest], concurrency: int) -> tuple[Run, float]:
        """The answers, and the seconds of CPU that they took."""
        began_s = time.process_time()
        found = self._loop.run_until_complete(Load(concurrency=concurrency).run(self._target, requests))
        return found, time.process_time() - began_s


@dataclass(frozen=True, slots=True)
class Pair:
    """One run of each side, and the seconds of CPU that each process spent on it."""

    http: Run
    offline: Run
    server_cpu_s: float
    client_cpu_s: float
    offline_cpu_s: float

    @property
    def http_s(self) -> float:
        return self.http.wall_s

    @property
    def offline_s(self) -> float:
        return self.offline.wall_s


@dataclass(slots=True)
class Overhead:
    """The same work over HTTP and without, in turn."""

    case: str
    num_requests: int
    pairs: list[Pair] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [pair.http_s / pair.offline_s for pair in self.pairs]

    def note(self) -> str:
        request_ms = median([pair.offline_s for pair in self.pairs]) / self.num_requests * 1000
        added = with_spread([(ratio - 1) * 100 for ratio in self.ratios], 1)
        return f"HTTP adds {added}% to the work of {self.case}: {request_ms:.0f} ms a request."

    def figures(self) -> dict[str, Any]:
        return {
            "http_s": [pair.http_s for pair in self.pairs],
            "offline_s": [pair.offline_s for pair in self.pairs],
            "ratio": median(self.ratios),
            "server_cpu_s": [pair.server_cpu_s for pair in self.pairs],
            "client_cpu_s": [pair.client_cpu_s for pair in self.pairs],
            "offline_cpu_s": [pair.offline_cpu_s for pair in self.pairs],
        }


def _in_turn(
    server: ServerProcess, offline: SideProcess, requests: Sequence[BenchRequest], concurrency: int, options: Options
) -> list[Pair]:
    """One untimed run of each side, then timed ones; each side is the first in every other pair, since a machine that
    grows slower or faster meanwhile would else be counted for one of them.
    """
    pairs: list[Pair] = []
    spent_s = 0.0
    while not pairs or not options.is_enough(len(pairs) - 1, spent_s):
        if len(pairs) % 2:
            without, offline_s = offline.call("run", requests, concurrency)[1]
            http, server_s, client_s = _measured(server, requests, concurrency)
        else:
            http, server_s, client_s = _measured(server, requests, concurrency)
            without, offline_s = offline.call("run", requests, concurrency)[1]
        found = Pair(http, without, server_s, client_s, offline_s)
        for side in (found.http, found.offline):
            failed = [answer for answer in side.answers if not answer.is_ok]
            if failed:
                raise RuntimeError(f"{len(failed)} requests failed, such as {failed[0].status} {failed[0].error}")
        spent_s += found.http_s + found.offline_s
        pairs.append(found)
    return pairs[1:]


def _measured(server: ServerProcess, requests: Sequence[BenchRequest], concurrency: int) -> tuple[Run, float, float]:
    """The answers over HTTP, and the seconds of CPU of the server and of its client."""
    server_s, client_s = _cpu_s(server), time.process_time()
    found = _over_http(server, requests, concurrency)
    client_s = time.process_time() - client_s
    return found, _cpu_s(server) - server_s, client_s


def _cpu_s(server: ServerProcess) -> float:
    """Seconds of CPU of the server's process and of those of its stages, since they began, as it tells itself."""
    lines = server.get("/metrics").text.splitlines()
    names = ("process_cpu_seconds_total", "vllm_omni_stage_processes_cpu_seconds")
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))


def _over_http(server: ServerProcess, requests: Sequence[BenchRequest], concurrency: int) -> Run:
    async def work() -> Run:
        async with HttpTarget(server.address, None, None, TIMEOUT_S) as target:
            return await Load(concurrency=concurrency).run(target, requests)

    return asyncio.run(work())


def _storm(server: ServerProcess, requests: Sequence[BenchRequest]) -> tuple[Run, Watch]:
    """All requests at once, while a monitor looks."""
    watch = Watch(server.address)
    with watch:
        return _over_http(server, requests, len(requests)), watch


@dataclass
class Watch:
    """A monitor in a thread: how long `/health` and `/metrics` take, again and again. A context manager."""

    address: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"/health": [], "/metrics": []})

    def __post_init__(self) -> None:
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def p99_ms(self, path: str) -> float:
        return float(np.percentile(self.seconds[path], 99)) * 1000

    def _look(self) -> None:
        place = urlsplit(self.address)
        connection = HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT_S)
        while not self._is_over.wait(PAUSE_S):
            for path, seconds in self.seconds.items():
                began_s = time.perf_counter()
                connection.request("GET", path)
                connection.getresponse().read()
                seconds.append(time.perf_counter() - began_s)
        connection.close()


def _first_token_s(run: Run) -> float:
    return median([answer.measures()["ttft"] for answer in run.answers])


def _took_s(answer: Answer) -> float:
    return (answer.ended_s or answer.began_s) - answer.began_s


def _work_table(found: Sequence[Overhead]) -> Table:
    rows = []
    for one in found:
        sides = ([pair.http_s for pair in one.pairs], [pair.offline_s for pair in one.pairs])
        rates = [with_spread([one.num_requests / seconds for seconds in side]) for side in sides]
        rows.append([one.case, *rates, with_spread(one.ratios, 3)])
    return Table("Requests per second", ("case", "HTTP", "offline", "time over HTTP / offline"), rows)


def _cpu_table(found: Sequence[Overhead]) -> Table:
    rows = []
    for one in found:
        sides = [
            [getattr(pair, name) / one.num_requests * 1000 for pair in one.pairs]
            for name in ("server_cpu_s", "client_cpu_s", "offline_cpu_s")
        ]
        rows.append([one.case, *(with_spread(side, 1) for side in sides)])
    return Table("CPU of a request, ms", ("case", "server", "its client", "offline"), rows)


def _storm_table(storm: Run, watch: Watch) -> Table:
    answered = sum(answer.is_ok for answer in storm.answers)
    row = [f"{len(storm.answers)} mixed requests at once", f"{answered}"]
    row += [f"{watch.p99_ms(path):.1f}" for path in watch.seconds]
    return Table("A crowd", ("case", "answers", "/health p99, ms", "/metrics p99, ms"), [row])


def _refusal_table(refused: Run) -> Table:
    statuses = Counter(answer.status for answer in refused.answers)
    times = [_took_s(answer) for answer in refused.answers if answer.status == "429"]
    others = len(refused.answers) - statuses["200"] - statuses["429"]
    slowest = f"{max(times) * 1000:.0f}" if times else "none"
    row = [
        f"{len(refused.answers)} pictures at once, {RUNNING} run, {QUEUE} wait",
        str(statuses["200"]),
        str(statuses["429"]),
    ]
    columns = ("case", "answered", "refused (429)", "other", "slowest refusal, ms")
    return Table("Beyond the queue", columns, [[*row, str(others), slowest]])


def _figures(
    work: Overhead, texts: Overhead, first: FirstTokens, storm: Run, watch: Watch, refused: Run
) -> dict[str, Any]:
    return {
        **work.figures(),
        "language_model": texts.figures(),
        "first_token_added_s": {way: first.added_s(way) for way in (SOCKET, CLIENT)},
        "crowd": dict(Counter(answer.status for answer in storm.answers)),
        "p99_ms": {path: watch.p99_ms(path) for path in watch.seconds},
        "refused": dict(Counter(answer.status for answer in refused.answers)),
        "refusals_s": [_took_s(answer) for answer in refused.answers if answer.status == "429"],
    }
