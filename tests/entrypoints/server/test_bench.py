"""`vllm-omni bench`: what is asked and when, what the times mean, and a real load on a real server and without one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.server import ServerProcess

from vllm_omni.entrypoints.bench.answer import Answer
from vllm_omni.entrypoints.bench.http_target import HttpTarget
from vllm_omni.entrypoints.bench.load import Load, Run
from vllm_omni.entrypoints.bench.mix import BenchRequest, Mix
from vllm_omni.entrypoints.bench.summary import parse_limits, summarise
from vllm_omni.entrypoints.cli import main
from vllm_omni.errors import ConfigError

MIXES = sorted((Path(__file__).parents[3] / "benchmarks" / "mixes").glob("*.yaml"))
OMNI = next(path for path in MIXES if path.stem == "omni")
WORDS = {"kind": "chat", "prompts": ["hello there", "thank you"]}


class Echo:
    """Answers each request after a while, and remembers how it was asked."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.takes_s = takes_s
        self.asked: list[tuple[float, BenchRequest]] = []
        self.most = self.now = 0

    async def ask(self, request: BenchRequest, answer: Answer) -> None:
        self.asked.append((time.perf_counter(), request))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.takes_s)
        self.now -= 1


def words(count: int) -> list[BenchRequest]:
    return Mix.of({"works": {"words": WORDS}}).draw(count, 0)


def answered(**moments: Any) -> Answer:
    return Answer("words", began_s=10.0, **moments)


# What is asked


@pytest.mark.parametrize("path", MIXES, ids=lambda path: path.stem)
def test_a_seed_draws_the_same_requests_in_the_shares_of_the_weights(path: Path) -> None:
    mix = Mix.read(path)
    drawn = mix.draw(4_000, 7)
    assert drawn == mix.draw(4_000, 7) and drawn != mix.draw(4_000, 8)
    total = sum(work.weight for work in mix.works)
    for work in mix.works:
        own = [request for request in drawn if request.work == work.name]
        assert len(own) / 4_000 == pytest.approx(work.weight / total, abs=0.03)
        assert len({json.dumps(request.body) for request in own}) == len(work.prompts)


@pytest.mark.parametrize(
    ("works", "words_of_error"),
    [
        ({}, "works: got"),
        ({"a": {"kind": "chat"}}, r"works\.a\.prompts: missing"),
        ({"a": {**WORDS, "kind": "chatt"}}, "did you mean 'chat'"),
        ({"a": {**WORDS, "wieght": 2}}, "did you mean 'weight'"),
        ({"a": {**WORDS, "weight": 0}}, r"works\.a\.weight: got 0"),
        ({"a": {**WORDS, "weight": float("nan")}}, r"works\.a\.weight: got nan"),
        ({"a": {**WORDS, "prompts": "hello"}}, "expected a list of texts"),
        ({"a": {**WORDS, "prompts": [1]}}, "nothing but texts"),
        ({"a": {**WORDS, "body": {"stream": False}}}, r"works\.a\.body\.stream"),
        ({"a": 3}, r"works\.a: got 3"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_with_its_place(works: Any, words_of_error: str) -> None:
    with pytest.raises(ConfigError, match=words_of_error):
        Mix.of({"works": works})


# When


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_a_closed_loop_asks_each_once_and_never_more_at_a_time(concurrency: int) -> None:
    target, requests = Echo(0.002), words(20)
    run = asyncio.run(Load(concurrency=concurrency).run(target, requests))
    assert sorted(map(id, requests)) == sorted(id(request) for _, request in target.asked)
    assert target.most == min(concurrency, 20)
    assert len(run.answers) == 20 and all(answer.is_ok for answer in run.answers)


def test_an_open_loop_asks_at_seeded_random_moments_however_long_answers_take() -> None:
    def moments(takes_s: float, seed: int) -> list[float]:
        run = asyncio.run(Load(rate=400, seed=seed).run(Echo(takes_s), words(100)))
        return [answer.began_s - run.began_s for answer in run.answers]

    slow = moments(0.3, 1)
    assert slow == pytest.approx(moments(0.0, 1)) and slow != pytest.approx(moments(0.0, 2))
    gaps = np.diff(slow)
    assert gaps.mean() == pytest.approx(1 / 400, rel=0.4)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.4)  # as of exponential gaps; of even ones it is 0


def test_times_count_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    class Blocking(Echo):
        async def ask(self, request: BenchRequest, answer: Answer) -> None:
            time.sleep(0.05)  # whoever keeps the load from being sent in time shows in the times

    run = asyncio.run(Load(rate=10_000).run(Blocking(), words(5)))
    assert max(answer.measures()["e2e"] for answer in run.answers) > 0.2  # of whichever was sent last


# What the times mean


def test_measures_are_seconds_since_the_request_was_due() -> None:
    answer = answered(first_text_s=10.5, last_text_s=12.5, num_deltas=3, num_tokens=5, first_sound_s=11.0, ended_s=13.0)
    assert answer.measures() == pytest.approx({"ttft": 0.5, "tpot": 0.5, "sound": 1.0, "e2e": 3.0})
    at_once = answered(first_text_s=10.5, last_text_s=10.5, num_deltas=1, num_tokens=9, ended_s=11)
    assert "tpot" not in at_once.measures()
    answer.fail("429", "full")
    assert answer.measures() == {}


def test_a_summary_has_percentiles_errors_and_what_kept_to_the_limits() -> None:
    ends = [10 + index / 10 for index in range(1, 101)]
    answers = [answered(ended_s=end, first_text_s=10.1, last_text_s=10.1, num_deltas=1) for end in ends]
    refused = [answered(status="429", error="the queue is full"), answered(status="connection")]
    found = summarise(Run([*answers, *refused], 10.0, 20.0), parse_limits("ttft=0.5, e2e=5"))
    expected = np.percentile([end - 10 for end in ends], [50, 90, 95, 99])
    assert [found["latency_s"]["e2e"][name] for name in ("p50", "p90", "p95", "p99")] == pytest.approx(expected)
    assert (found["num_requests"], found["num_ok"], found["requests_per_s"]) == (102, 100, 5.0)
    assert found["errors"] == {"429": 1, "connection": 1}
    assert found["goodput"]["share"] == pytest.approx(50 / 102)
    assert found["works"]["words"]["latency_s"] == found["latency_s"]


@pytest.mark.parametrize("limits", ["ttft", "ttft=", "ttft=0", "e2e=-1", "e2e=nan", "e2e=inf", "first=1"])
def test_limits_that_cannot_be_are_refused(limits: str) -> None:
    with pytest.raises(ConfigError, match="--goodput: got"):
        parse_limits(limits)


# A real load


def bench(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["bench", *arguments, "-o", str(tmp_path / "found.json"), "-o", str(tmp_path / "found.png"), "-q"])
    return code, json.loads((tmp_path / "found.json").read_text())


def test_http_and_offline_do_the_same_work(server: ServerProcess, tmp_path: Path) -> None:
    load = ["--mix", str(OMNI), "--requests", "14", "--warmup", "1", "--seed", "2", "--concurrency", "7"]
    code, http = bench(tmp_path, "serve", "--url", server.base_url, "--model", "tiny-omni", *load)
    assert code == 0 and http["summary"]["errors"] == {}
    with Image.open(tmp_path / "found.png") as plot:
        assert plot.width > 500
    code, offline = bench(tmp_path, "offline", "--config", "tiny_omni", *load)
    assert code == 0 and offline["summary"]["errors"] == {}
    for here, there in zip(http["answers"], offline["answers"], strict=True):
        assert (here["work"], here["tokens"]) == (there["work"], there["tokens"])
        assert set(here) - {"tpot"} == set(there) - {"tpot"}  # the last words may come at once
        assert here["e2e"] > 0 and there["e2e"] > 0
    had = {name: set(about["latency_s"]) - {"tpot"} for name, about in http["summary"]["works"].items()}
    assert had == {
        "words": {"ttft", "e2e"},
        "picture": {"preview", "e2e"},
        "sound": {"ttft", "sound", "e2e"},
        "all": {"ttft", "preview", "sound", "e2e"},
    }


def load_of(tmp_path: Path, about: dict[str, Any], *flags: str) -> Sequence[str]:
    (tmp_path / "mix.yaml").write_text(json.dumps({"works": {"only": about}}))
    return ["--mix", str(tmp_path / "mix.yaml"), "--requests", "3", "--warmup", "0", *flags]


@pytest.mark.parametrize(
    ("about", "error"),
    [
        ({"kind": "chat", "body": {"model_": "x"}}, "400"),
        ({"kind": "image", "body": {"num_inference_steps": 100, "timeout": 0.05}}, "deadline_exceeded"),
    ],
)
def test_errors_are_counted_by_their_kind(
    server: ServerProcess, tmp_path: Path, about: dict[str, Any], error: str
) -> None:
    load = load_of(tmp_path, {"prompts": ["a red circle"], **about}, "--rate", "50")
    code, found = bench(tmp_path, "serve", "--url", server.address, "--model", "tiny-image", *load)
    assert code == 1 and found["summary"]["num_ok"] == 0
    statuses = found["summary"]["errors"]
    assert sum(statuses.values()) == 3 and set(statuses) <= {error, "504"} and found["summary"]["first_errors"]


def test_an_unknown_model_and_an_absent_server_are_errors_and_no_crash(server: ServerProcess, tmp_path: Path) -> None:
    load = load_of(tmp_path, WORDS)
    code, found = bench(tmp_path, "serve", "--url", server.address, "--model", "nobody", *load)
    assert (code, found["summary"]["errors"]) == (1, {"404": 3})
    code, found = bench(tmp_path, "serve", "--url", "http://127.0.0.1:9", *load)
    assert (code, found["summary"]["errors"]) == (1, {"connection": 3})


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rate", "0"], "--rate: got 0"),
        (["--requests", "0"], "--requests: got 0"),
        (["--concurrency", "0"], "--concurrency: got 0"),
        (["-o", "found.txt"], "--output: got 'found.txt'"),
        (["-o", "nowhere/found.json"], "there is no folder"),
        (["--url", "ftp://here"], "--url: got 'ftp://here'"),
        (["--goodput", "soon=1"], "--goodput: got 'soon'"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_sent(
    tmp_path: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *load_of(tmp_path, WORDS), *flags]) == 1
    assert complaint in capsys.readouterr().err


def test_offline_says_which_kinds_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "offline", *load_of(tmp_path, {"kind": "speech", "prompts": ["3 7"]})]) == 1
    assert "works.only.kind: got 'speech'" in capsys.readouterr().err


def test_a_connection_serves_one_request_after_the_other() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"e\r\ndata: [DONE]\n\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)  # its end comes by itself
        writer.write(b"0\r\n\r\n")

    _, num_connections = asked_of(answer, 3)
    assert num_connections == 1


def test_an_event_may_be_longer_than_what_is_read_at_once() -> None:
    event = json.dumps({"choices": [{"text": "a"}], "usage": {"completion_tokens": 7}, "picture": "p" * 2**20}).encode()

    async def answer(writer: asyncio.StreamWriter) -> None:
        content = b"data: " + event + b"\r\n\r\ndata: [DONE]\n\n"
        for start in range(0, len(content), 100_000):
            piece = content[start : start + 100_000]
            writer.write((CHUNKED if start == 0 else b"") + b"%x\r\n" % len(piece) + piece + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    (found,), _ = asked_of(answer, 1)
    assert (found.status, found.num_deltas, found.num_tokens) == ("200", 1, 7)


@pytest.mark.parametrize(("stays", "status"), [(True, "timeout"), (False, "connection")])
def test_a_server_that_goes_silent_or_away_in_its_answer_is_an_error(stays: bool, status: str) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b'14\r\ndata: {"choices":[]}\r\n')
        await writer.drain()
        if stays:
            await asyncio.sleep(0.5)
        writer.close()

    (found,), _ = asked_of(answer, 1, timeout_s=0.2)
    assert found.status == status and found.error


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def asked_of(
    answer: Callable[[asyncio.StreamWriter], Awaitable[None]], count: int, timeout_s: float = 10
) -> tuple[list[Answer], int]:
    """What `count` requests, one after the other, get of a server that answers so; and how many connections it saw."""
    num_connections = 0
    found = [answered(num_deltas=0) for _ in range(count)]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.findall(rb"content-length: (\d+)", head.lower())[0]))
                await answer(writer)
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            async with HttpTarget(f"http://{host}:{port}", None, None, timeout_s) as target:
                for request, each in zip(words(count), found, strict=True):
                    await target.ask(request, each)

    asyncio.run(main())
    return found, num_connections
