"""Step caches on the shipped picture model: the blocks that they compute, the distance of their latents and the share
judged right, against fewer steps without one.

The detector of tools/tiny/image is the judge. A second table shows what a known prompt with a new seed saves.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import ROOT, Options, Report, Table, median, with_spread
from benchmarks.sides import SideProcess
from benchmarks.step_caches import Subject, in_turn, run_subject

PICTURE = ROOT / "benchmarks" / "results" / "cache.png"
STEPS, FEWER_STEPS = 20, (2, 4, 6, 8, 10, 13, 16)
FITTED_ON = ("a large pink star", "a red circle left of a blue square", "a small green ring", "a cyan diamond")


def prompts(count: int) -> list[tuple[str, Any]]:
    from tools.tiny.image.evaluate import CASES, prompts_for

    cases = [case for case in CASES if not case.is_loose]
    return in_turn([prompts_for(case, -(-count // len(cases)), seed=1000) for case in cases], count)


def is_right(output: Any, scene: Any) -> bool:
    import numpy as np

    from tools.tiny.image import judge

    return judge.is_right(np.asarray(output.images[0]), scene)


SUBJECT = Subject("cache", "tiny_image", "image", STEPS, FEWER_STEPS, 6, FITTED_ON, prompts, is_right)


class Asked:
    """One picture at a time."""

    def __init__(self) -> None:
        from vllm_omni import Omni

        self._omni = Omni("tiny_image", device="cpu", progress=False)

    def ask(self, prompt: str, seed: int) -> tuple[float, bool]:
        """(seconds, whether the text stage was skipped) of one picture."""
        from vllm_omni import DiffusionParams

        started = time.perf_counter()
        output = self._omni.generate(prompt, DiffusionParams(seed=seed))[0]
        seconds = time.perf_counter() - started
        return seconds, output.metrics["text"].get("steps", 0) == 0


def run(options: Options, limits: Limits | None = None) -> Report:
    found = run_subject(SUBJECT, options, 2 if options.is_quick else 16, PICTURE)
    with SideProcess("vllm_omni", options.threads, Asked) as us:
        embeds = prompt_embeds(us, options)
    return dataclasses.replace(
        found,
        tables=[*found.tables, Table("One picture, s", ("prompt", "wall time", "text stage skipped"), embeds)],
        notes=[*found.notes, "Judged by the detector of tools/tiny/image: single objects, pairs, three, unseen pairs."],
        figures={**found.figures, "prompt_embeds": embeds},
    )


def prompt_embeds(us: SideProcess, options: Options) -> list[list[str]]:
    """A prompt that is new each time and one that is known, each with new seeds, in turn."""
    times: dict[str, list[float]] = {"new": [], "known, new seed": []}
    skipped = dict.fromkeys(times, 0)
    us.call("ask", "a large pink star", 0)
    for index in range(2 if options.is_quick else 4 * options.repeats):
        for name, prompt in zip(times, (f"a small red ring number {index}", "a large pink star"), strict=True):
            seconds, was_skipped = us.call("ask", prompt, index + 1)[1]
            times[name].append(seconds)
            skipped[name] += was_skipped
    saved = 1 - median(times["known, new seed"]) / median(times["new"])
    rows = [[name, with_spread(times[name], 3), f"{skipped[name]} of {len(times[name])}"] for name in times]
    return [*rows, ["saved by knowing it", f"{saved:.1%}", ""]]
