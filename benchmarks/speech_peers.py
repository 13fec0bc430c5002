"""Time to the first sound and speed of Qwen3-TTS of 0.6B's shape: ours against the qwen-tts package's own `generate`.

Both speak the same texts, as many frames each, from one folder of random weights, greedily. The package has an
environment of its own (tools/peers.py), takes several texts as one batch, and gives its sound at the end: its first
sound comes then. We get the texts as requests at once, each a stream.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.limits import Limits
from benchmarks.measure import ROOT, Options, Report, Table, median, with_spread
from benchmarks.peers.environments import DEFAULT_FOLDER, QWEN_TTS, PeerEnvironment
from benchmarks.peers.process import PeerProcess
from benchmarks.sides import Asked, Duel, SideProcess, rounds

CONFIG = "qwen3_tts"
DTYPE = "bfloat16"
SIZE = "0.6B"
FRAMES_PER_S = 12.5
SPEAKER, LANGUAGE = "ryan", "english"
NUM_LETTERS = 60  # of a text: each is a token
COUNTS = (1, 4, 8)  # requests at once
SECONDS = 4.0  # of sound of each
COLUMNS = ("case", "ours, s of sound/s", "qwen-tts, s of sound/s", "ours / qwen-tts", "same first codes")
FIRST_COLUMNS = ("case", "ours, s", "qwen-tts, s", "qwen-tts / ours")


@dataclass(frozen=True, slots=True)
class Case:
    count: int
    frames: int

    def texts(self, repeat: int) -> list[str]:
        """Never the same twice, all of one length."""
        drawn = np.random.default_rng(repeat).choice(list("abcdefghij"), (self.count, NUM_LETTERS))
        return ["".join(row) for row in drawn]


class Ours:
    """All requests at once, each a stream; notes when each gave its first sound."""

    def __init__(self, folder: str, dtype: str) -> None:
        from vllm_omni import AsyncOmni

        overrides = ["outputs=[speech, talker.codes]"]
        self._omni = AsyncOmni(CONFIG, model=folder, overrides=overrides, device="cpu", dtype=dtype)
        self._first_of_runs: list[float] = []

    def run(self, case: Case, repeat: int) -> list[list[list[int]]]:
        return asyncio.run(self._run(case, repeat))

    def first_s(self, num_runs: int) -> list[float]:
        """Of each of the last runs: seconds until every request had sounded."""
        return self._first_of_runs[-num_runs:]

    async def _run(self, case: Case, repeat: int) -> list[list[list[int]]]:
        started = time.perf_counter()
        heard = await asyncio.gather(*(self._listen(case, text, started) for text in case.texts(repeat)))
        self._first_of_runs.append(max(first_s for first_s, _ in heard))
        return [codes for _, codes in heard]

    async def _listen(self, case: Case, text: str, started: float) -> tuple[float, list[list[int]]]:
        from vllm_omni import SamplingParams

        prompt = {"prompt": text, "voice": SPEAKER, "language": LANGUAGE, "subtalker_temperature": 0}
        params = {"talker": SamplingParams(temperature=0.0, max_tokens=case.frames)}
        output, first_s = None, None
        async for output in self._omni.stream(prompt, params):
            if first_s is None and output.audios:
                first_s = time.perf_counter() - started
        if output is None or output.error is not None or first_s is None:
            raise RuntimeError(f"no sound: {output}")
        return first_s, output.tensors["talker.codes"].tolist()


def run(options: Options, limits: Limits | None = None, environment: PeerEnvironment = QWEN_TTS) -> Report:
    place = Path(options.peers) if options.peers else DEFAULT_FOLDER
    if environment.versions(place) is None:
        return Report("speech_peers", [], notes=[environment.how_to_make(place)])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_folder(environment, place, folder, options.is_quick)
        us = stack.enter_context(SideProcess("vllm_omni", options.threads, Ours, folder, DTYPE))
        peer = stack.enter_context(_peer_of(environment, place, options.threads))
        peer.call("load", folder, DTYPE, options.threads)
        found, firsts = [], []
        for case in cases(options):
            ((duel,),) = rounds(us, [peer], [case], same_codes, options, ask)
            found.append(duel)
            firsts.append(first_sound(us, duel))
        memory = [[side.name, f"{side.peak_memory_mb():.0f}"] for side in (us, peer)]
    return Report(
        "speech_peers",
        [
            Table(f"Seconds of sound per second, {SIZE}, {DTYPE}", COLUMNS, [duel.cells() for duel in found]),
            Table("Seconds until every request sounds", FIRST_COLUMNS, firsts),
            Table("Peak memory, MiB", ("side", "after all cases"), memory),
        ],
        notes=[
            f"Random weights of {SIZE}'s shape, greedy, {NUM_LETTERS} tokens of text to a request: speed, and equality "
            "of the first frames, until rounding decides a code.",
            f"{environment.name} {environment.version(place)}, in an environment of its own.",
        ],
        figures={"duels": [duel.figures() for duel in found], "first_sound": firsts, "peak_memory_mb": dict(memory)},
    )


def write_folder(environment: PeerEnvironment, place: Path, folder: str, is_quick: bool) -> None:
    """In a process that leaves no trace in the memory of the sides."""
    command = [str(environment.python(place)), "-m", "benchmarks.qwen3_tts.folder", folder, SIZE]
    subprocess.run([*command, *(["--quick"] if is_quick else [])], check=True, cwd=ROOT, capture_output=True)


def cases(options: Options) -> list[tuple[str, float, Case]]:
    """(name, seconds of sound of all requests, case)."""
    counts, seconds = ((2,), 0.4) if options.is_quick else (COUNTS, SECONDS)
    frames = round(seconds * FRAMES_PER_S)
    return [(f"{count} x {seconds:g} s", count * seconds, Case(count, frames)) for count in counts]


def ask(side: Asked, case: Case, repeat: int) -> tuple[float, Any]:
    if isinstance(side, SideProcess):
        return side.call("run", case, repeat)
    return side.call("speak", case.texts(repeat), SPEAKER, LANGUAGE, case.frames)


def first_sound(us: SideProcess, duel: Duel) -> list[str]:
    """In the timed runs; the peer's first sound is its last."""
    ours: list[float] = us.call("first_s", len(duel.us_s))[1]
    ratio = median(duel.peer_s) / median(ours)
    return [duel.case, with_spread(ours, 3), with_spread(duel.peer_s, 3), f"{ratio:.1f}"]


def same_codes(ours: Sequence[Sequence[list[int]]], theirs: Sequence[Sequence[list[int]]]) -> str:
    """Of the first frame of each request, and whether all have as many frames."""
    assert [len(codes) for codes in ours] == [len(codes) for codes in theirs]
    pairs = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine[0], other[0], strict=True)]
    return f"{sum(a == b for a, b in pairs) / len(pairs):.0%}"


def _peer_of(environment: PeerEnvironment, place: Path, threads: int) -> PeerProcess:
    command = [str(environment.python(place)), "-m", environment.module]
    return PeerProcess(environment.name, command, environment.variables(environment.root(place), threads))
