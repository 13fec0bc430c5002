"""Step caches on the shipped model: pictures per second and the share judged right, against fewer steps without one.

All variants draw the same prompts, part by part in turn, so that every picture that is timed is judged too. The
detector of tools/tiny is the judge. A second table shows what a known prompt with a new seed saves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table, median, with_spread
from benchmarks.sides import SideProcess

CONFIG = "tiny_image.yaml"
STEPS = (3, 4, 6, 9, 12, 16, 20, 30)
CACHED_STEPS = (9, 20, 30)
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
COLUMNS = ("variant", "pictures/s", "steps replayed", "judged right", "right without a cache in the same time")


@dataclass(slots=True)
class Variant:
    """threshold: of first_block; None is no step cache."""

    steps: int
    threshold: float | None
    seconds: list[float] = field(default_factory=list)
    num_made: int = 0
    num_right: int = 0
    num_replayed: int = 0

    @property
    def name(self) -> str:
        return f"{self.steps} steps, " + ("no cache" if self.threshold is None else f"first_block {self.threshold:g}")

    @property
    def made_s(self) -> float:
        return sum(self.seconds) / self.num_made

    @property
    def right(self) -> float:
        return self.num_right / self.num_made


class Ours:
    """One Omni for each threshold; the prompts of all cases of the evaluation."""

    def __init__(self, count: int) -> None:
        from tools.tiny.evaluate import CASES, prompts_for

        cases = [case for case in CASES if not case.is_loose]
        prompts = [prompts_for(case, -(-count // len(cases)), seed=1000) for case in cases]
        self._prompts = [prompt for group in zip(*prompts, strict=True) for prompt in group][:count]
        self._omnis: dict[float | None, Any] = {}

    def draw(self, variant: Variant, start: int, stop: int) -> tuple[float, int, int]:
        """(seconds, pictures judged right, replayed steps) of the prompts start .. stop - 1."""
        import numpy as np

        from tools.tiny.judge import is_right
        from vllm_omni import DiffusionParams

        omni = self._omni(variant.threshold)
        chosen = self._prompts[start:stop]
        seeds = range(start, start + len(chosen))
        params = [DiffusionParams(seed=seed, num_inference_steps=variant.steps) for seed in seeds]
        started = time.perf_counter()
        outputs = omni.generate([words for words, _ in chosen], params)
        seconds = time.perf_counter() - started
        right = sum(
            is_right(np.asarray(output.images[0]), scene) for output, (_, scene) in zip(outputs, chosen, strict=True)
        )
        return seconds, right, sum(output.metrics["image"]["cache_hits"] for output in outputs)

    def ask(self, prompt: str, seed: int) -> tuple[float, bool]:
        """(seconds, whether the text stage was skipped) of one picture."""
        from vllm_omni import DiffusionParams

        omni = self._omni(None)
        started = time.perf_counter()
        output = omni.generate(prompt, DiffusionParams(seed=seed))[0]
        seconds = time.perf_counter() - started
        return seconds, output.metrics["text"].get("steps", 0) == 0

    def _omni(self, threshold: float | None) -> Any:
        from vllm_omni import Omni

        if threshold not in self._omnis:
            cache = f"{{policy: first_block, threshold: {threshold}}}" if threshold is not None else "{policy: none}"
            overrides = [f"image.cache={cache}"]
            self._omnis[threshold] = Omni(CONFIG, overrides=overrides, device="cpu", progress=False)
            self._omnis[threshold].generate("warm up")
        return self._omnis[threshold]


def run(options: Options, limits: Limits | None = None) -> Report:
    count, part = (4, 2) if options.is_quick else (64, 16)
    variants = [Variant(steps, None) for steps in (STEPS[:2] if options.is_quick else STEPS)]
    variants += [
        Variant(steps, threshold)
        for steps in ((4,) if options.is_quick else CACHED_STEPS)
        for threshold in (THRESHOLDS[-1:] if options.is_quick else THRESHOLDS)
    ]
    with SideProcess("vllm_omni", options.threads, Ours, count) as us:
        for start in range(0, count, part):
            for variant in variants:
                seconds, right, replayed = us.call("draw", variant, start, start + part)[1]
                variant.seconds.append(seconds)
                variant.num_made += part
                variant.num_right += right
                variant.num_replayed += replayed
        embeds = prompt_embeds(us, options)
    return Report(
        "cache",
        [
            Table(f"Step caches, {count} pictures each", COLUMNS, [cells(variant, variants) for variant in variants]),
            Table("One picture, s", ("prompt", "wall time", "text stage skipped"), embeds),
        ],
        notes=["Judged by the detector of tools/tiny: single objects, pairs, three objects, unseen pairs."],
        figures={
            "variants": [
                {
                    "name": variant.name,
                    "part_s": variant.seconds,
                    "right": variant.right,
                    "replayed": variant.num_replayed / (variant.num_made * variant.steps),
                }
                for variant in variants
            ],
            "prompt_embeds": embeds,
        },
    )


def cells(variant: Variant, variants: Sequence[Variant]) -> list[str]:
    rates = [variant.num_made / len(variant.seconds) / seconds for seconds in variant.seconds]
    replayed = variant.num_replayed / (variant.num_made * variant.steps)
    return [variant.name, with_spread(rates), f"{replayed:.0%}", f"{variant.right:.1%}", baseline(variant, variants)]


def baseline(variant: Variant, variants: Sequence[Variant]) -> str:
    """What the most steps without a cache give that take no longer."""
    if variant.threshold is None:
        return ""
    plain = [other for other in variants if other.threshold is None and other.made_s <= variant.made_s]
    if not plain:
        return "none is as fast"
    best = max(plain, key=lambda other: other.steps)
    return f"{best.right:.1%} ({best.steps} steps)"


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
