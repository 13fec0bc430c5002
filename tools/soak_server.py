"""Kills clients of a server at random under load, and shows that nothing of them is left when it is quiet again.

    python -m tools.soak_server --seconds 120

What is counted, before and after: KV blocks that are held, tasks of the event loop, open files and sockets, temporary
files, memory. One request in a hundred is made to fail in the middle of its work, and must fail alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.belongings import descendants, descriptors
from tests.support.server import ServerProcess
from vllm_omni.entrypoints.bench.mix import ROUTES, BenchRequest, Mix

MIX = Path(__file__).resolve().parents[1] / "benchmarks" / "mixes" / "omni.yaml"
CLIENTS = 12
SHARE_KILLED = 0.6
FAILS_EVERY = 100
MAX_LIFE_S = 0.6  # of a client that is killed
MAX_MORE_SEGMENTS = 2 * CLIENTS  # of what processes lend each other at the same time, which both hold
SHARED = "/memfd"  # descriptors of theirs
MAX_GROWTH_MB = 48.0  # of memory, beyond what it was when the server had warmed up
FAILING = {"num_inference_steps": 100, "timeout": 0.1}  # the deadline passes between two steps
QUIET_S = 60.0
# memory of a pool is the machine's when it is first written: small pools are full before the load that is looked at
SMALL_POOLS = [
    word
    for stage in ("thinker", "scene_text", "sound_text", "lyrics")
    for word in ("--set", f"{stage}.kv_memory_mb=16")
]
RESIDENT = ("process_resident_memory_bytes", "vllm_omni_stage_processes_resident_bytes")  # the server's, its stages'
# libraries keep kernels of all shapes that they have seen, and memory for each thread; without that, what grows is ours
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True, slots=True)
class Level:
    """What a server holds while nobody asks it for anything."""

    held_blocks: int
    tasks: int  # of the event loop
    descriptors: int
    segments: int  # of memory that processes share; they are kept for the next tensors
    temporary_files: int
    memory_mb: float

    def leaks(self, before: Level) -> list[str]:
        """What is more than it was; of memory, and of what is lent at once, a little more is not."""
        memory_mb, segments = before.memory_mb + MAX_GROWTH_MB, before.segments + MAX_MORE_SEGMENTS
        now, then = asdict(self), {**asdict(before), "memory_mb": memory_mb, "segments": segments}
        return [f"{name}: {asdict(before)[name]} before, {now[name]} after" for name in now if now[name] > then[name]]


@dataclass(slots=True)
class Findings:
    """before, after: the load that is looked at."""

    before: Level | None = None
    after: Level | None = None
    ends: Counter[str] = field(default_factory=Counter)  # "killed", "answered", "failed as meant"
    wrongs: list[str] = field(default_factory=list)  # what should not have happened

    @property
    def complaints(self) -> list[str]:
        assert self.before is not None and self.after is not None
        return [*self.wrongs, *self.after.leaks(self.before)]


class Soak:
    """address, pid: of the server. folder: where its temporary files lie (its TMPDIR)."""

    def __init__(self, address: str, pid: int, folder: Path, seed: int = 0) -> None:
        self._address = address
        self._pid = pid
        self._folder = folder
        self._draws = random.Random(seed)
        self._requests = Mix.read(MIX).draw(10_000, seed)
        self._sent = 0
        self._texts: dict[str, str] = {}  # what was answered first, by prompt

    async def run(self, seconds: float, warmup_s: float) -> Findings:
        """The load twice: once so that caches and pools have their size, once to be looked at."""
        findings = Findings()
        await self._load(warmup_s, findings)
        findings.before = await self._level()
        await self._load(seconds, findings)
        findings.after = await self._level()
        return findings

    async def _load(self, seconds: float, findings: Findings) -> None:
        end_s = time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=120, base_url=self._address) as client:
            await asyncio.gather(*(self._client(client, end_s, findings) for _ in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, end_s: float, findings: Findings) -> None:
        while time.monotonic() < end_s:
            request = self._requests[self._sent % len(self._requests)]
            self._sent += 1
            if self._sent % FAILS_EVERY == 0:
                await self._fail(client, findings)
            elif self._draws.random() < SHARE_KILLED:
                await self._kill(request)
                findings.ends["killed"] += 1
            else:
                await self._answer(client, request, findings)

    async def _kill(self, request: BenchRequest) -> None:
        """A client that asks, reads or does not, and is gone from one moment to the next, without a farewell."""
        place = urlsplit(self._address)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        content = json.dumps({**request.body, "stream": self._draws.random() < 0.7}).encode()
        head = f"POST {ROUTES[request.kind]} HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content[: self._cut(len(content))])
        life_s = self._draws.random() * MAX_LIFE_S
        is_reader = self._draws.random() < 0.5
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read() if is_reader else asyncio.Event().wait(), life_s)
        writer.transport.abort()

    def _cut(self, length: int) -> int:
        """Now and then the body is not even whole."""
        return self._draws.randrange(length) if self._draws.random() < 0.1 else length

    async def _answer(self, client: httpx.AsyncClient, request: BenchRequest, findings: Findings) -> None:
        body = {name: value for name, value in request.body.items() if name != "partial_images"}
        got = await client.post(ROUTES[request.kind], json=body)
        if got.status_code != 200:
            findings.wrongs.append(f"{request.work}: {got.status_code} {got.text[:200]}")
            return
        findings.ends["answered"] += 1
        text, prompt = _text(got.json()), json.dumps(body)
        if text is not None and self._texts.setdefault(prompt, text) != text:
            findings.wrongs.append(f"{prompt[:120]}: {self._texts[prompt]!r} at first, {text!r} later")

    async def _fail(self, client: httpx.AsyncClient, findings: Findings) -> None:
        got = await client.post(ROUTES["image"], json={"prompt": "a large pink star please", **FAILING})
        if got.status_code == 504 and got.json()["error"]["code"] == "deadline_exceeded":
            findings.ends["failed as meant"] += 1
        else:
            findings.wrongs.append(f"a request past its deadline: {got.status_code} {got.text[:200]}")

    async def _level(self) -> Level:
        """Once nothing waits or runs, and what the server knows of its engines is newer than that."""
        deadline_s = time.monotonic() + QUIET_S
        async with httpx.AsyncClient(timeout=60, base_url=self._address) as client:
            while True:
                await asyncio.sleep(1.2)  # longer than gauges of the engines are kept
                await client.get("/metrics")
                await asyncio.sleep(0.2)
                values = _values((await client.get("/metrics")).text)
                is_busy = sum(values[f"vllm_omni_requests_{word}"] for word in ("served", "waiting", "running"))
                if not is_busy or time.monotonic() > deadline_s:
                    break
        await asyncio.sleep(0.5)  # until the server, too, has closed our own connections
        held = sum(map(descriptors, (self._pid, *descendants(self._pid))), Counter[str]())
        return Level(
            held_blocks=round(values["vllm_omni_kv_blocks"] - values["vllm_omni_kv_blocks_free"]),
            tasks=round(values["vllm_omni_event_loop_tasks"]),
            descriptors=sum(number for kind, number in held.items() if not kind.startswith(SHARED)),
            segments=sum(number for kind, number in held.items() if kind.startswith(SHARED)),
            temporary_files=sum(len(files) for _, _, files in os.walk(self._folder)),
            memory_mb=round(sum(values[name] for name in RESIDENT) / 2**20, 1),
        )


def _values(metrics: str) -> dict[str, float]:
    """Every sample's name -> its sum over all labels."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            found[sample.name] += sample.value  # type: ignore[assignment]
    return dict(found)


def _text(answer: Mapping[str, Any]) -> str | None:
    content = answer["choices"][0]["message"]["content"] if "choices" in answer else None
    return content if isinstance(content, str) else None


def show(findings: Findings) -> Iterable[str]:
    assert findings.before is not None and findings.after is not None
    yield ", ".join(f"{count} {name}" for name, count in sorted(findings.ends.items()))
    after = asdict(findings.after)
    for name, value in asdict(findings.before).items():
        yield f"{name:16} {value:>8} before {after[name]:>8} after"
    yield from (f"WRONG: {complaint}" for complaint in findings.complaints)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load that is looked at (default: 120)")
    parser.add_argument("--warmup", type=float, default=30.0, metavar="S", help="of load before it (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of who asks what and dies when (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ENVIRONMENT, TMPDIR=folder)  # the server's
        with ServerProcess(["tiny_omni"], SMALL_POOLS) as server:
            soak = Soak(server.address, server.pid, Path(folder), args.seed)
            findings = asyncio.run(soak.run(args.seconds, args.warmup))
    print("\n".join(show(findings)))
    return int(bool(findings.complaints))


if __name__ == "__main__":
    sys.exit(main())
