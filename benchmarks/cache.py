"""Step caches on the shipped picture model: pictures per second and the share judged right, against fewer steps without
one.

The detector of tools/tiny/image is the judge. A second table shows what a known prompt with a new seed saves.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table, median, with_spread
from benchmarks.sides import SideProcess
from benchmarks.step_caches import COLUMNS, JudgedModel, Subject, cells, grid, in_turn, measure

STEPS = (3, 4, 6, 9, 12, 16, 20, 30)
CACHED_STEPS = (9, 20, 30)


def prompts(count: int) -> list[tuple[str, Any]]:
    from tools.tiny.image.evaluate import CASES, prompts_for

    cases = [case for case in CASES if not case.is_loose]
    return in_turn([prompts_for(case, -(-count // len(cases)), seed=1000) for case in cases], count)


def is_right(output: Any, scene: Any) -> bool:
    import numpy as np

    from tools.tiny.image import judge

    return judge.is_right(np.asarray(output.images[0]), scene)


SUBJECT = Subject("tiny_image.yaml", "image", "warm up", prompts, is_right)


class Pictures(JudgedModel):
    def ask(self, prompt: str, seed: int) -> tuple[float, bool]:
        """(seconds, whether the text stage was skipped) of one picture."""
        from vllm_omni import DiffusionParams

        omni = self.omni(None)
        started = time.perf_counter()
        output = omni.generate(prompt, DiffusionParams(seed=seed))[0]
        seconds = time.perf_counter() - started
        return seconds, output.metrics["text"].get("steps", 0) == 0


def run(options: Options, limits: Limits | None = None) -> Report:
    count, part = (4, 2) if options.is_quick else (64, 16)
    variants = grid(options, STEPS, CACHED_STEPS)
    with SideProcess("vllm_omni", options.threads, Pictures, SUBJECT, count) as us:
        measure(us, variants, count, part)
        embeds = prompt_embeds(us, options)
    columns = ("variant", "pictures/s", *COLUMNS)
    return Report(
        "cache",
        [
            Table(f"Step caches, {count} pictures each", columns, [cells(variant, variants) for variant in variants]),
            Table("One picture, s", ("prompt", "wall time", "text stage skipped"), embeds),
        ],
        notes=["Judged by the detector of tools/tiny/image: single objects, pairs, three objects, unseen pairs."],
        figures={"variants": [variant.figures() for variant in variants], "prompt_embeds": embeds},
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
