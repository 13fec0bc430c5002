"""Step caches on the shipped sound model: sounds per second and the share judged right, against fewer steps without.

As `benchmarks.cache`, with the detector of tools/tiny/audio as the judge.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.cache import Variant, cells
from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import SideProcess

CONFIG = "tiny_audio.yaml"
STEPS = (1, 2, 4, 8, 16, 24)
CACHED_STEPS = (8, 24)
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
COLUMNS = ("variant", "sounds/s", "steps replayed", "judged right", "right without a cache in the same time")


class Ours:
    """One Omni for each threshold; the prompts of all cases of the evaluation, in turn."""

    def __init__(self, count: int) -> None:
        from tools.tiny.audio.evaluate import CASES, prompts_for

        prompts = [prompts_for(case, -(-count // len(CASES)), seed=1000) for case in CASES]
        self._prompts = [prompt for group in zip(*prompts, strict=True) for prompt in group][:count]
        self._omnis: dict[float | None, Any] = {}

    def play(self, variant: Variant, start: int, stop: int) -> tuple[float, int, int]:
        """(seconds, sounds judged right, replayed steps) of the prompts start .. stop - 1."""
        from tools.tiny.audio.evaluate import samples_of
        from tools.tiny.audio.judge import judge
        from vllm_omni import DiffusionParams

        omni = self._omni(variant.threshold)
        chosen = self._prompts[start:stop]
        seeds = range(start, start + len(chosen))
        params = [DiffusionParams(seed=seed, num_inference_steps=variant.steps) for seed in seeds]
        started = time.perf_counter()
        outputs = omni.generate([words for words, _ in chosen], params)
        seconds = time.perf_counter() - started
        right = sum(
            judge(sound, samples_of(output)).is_right for output, (_, sound) in zip(outputs, chosen, strict=True)
        )
        return seconds, right, sum(output.metrics["sound"]["cache_hits"] for output in outputs)

    def _omni(self, threshold: float | None) -> Any:
        from vllm_omni import Omni

        if threshold not in self._omnis:
            cache = f"{{policy: first_block, threshold: {threshold}}}" if threshold is not None else "{policy: none}"
            self._omnis[threshold] = Omni(CONFIG, overrides=[f"sound.cache={cache}"], device="cpu", progress=False)
            self._omnis[threshold].generate("C4")
        return self._omnis[threshold]


def run(options: Options, limits: Limits | None = None) -> Report:
    count, part = (2, 2) if options.is_quick else (48, 16)
    variants = [Variant(steps, None) for steps in (STEPS[:2] if options.is_quick else STEPS)]
    variants += [
        Variant(steps, threshold)
        for steps in ((4,) if options.is_quick else CACHED_STEPS)
        for threshold in (THRESHOLDS[-1:] if options.is_quick else THRESHOLDS)
    ]
    with SideProcess("vllm_omni", options.threads, Ours, count) as us:
        for start in range(0, count, part):
            for variant in variants:
                seconds, right, replayed = us.call("play", variant, start, start + part)[1]
                variant.seconds.append(seconds)
                variant.num_made += part
                variant.num_right += right
                variant.num_replayed += replayed
    return Report(
        "audio_cache",
        [Table(f"Step caches, {count} sounds of two seconds each", COLUMNS, [cells(v, variants) for v in variants])],
        notes=[
            "Judged by the detector of tools/tiny/audio: notes, timbre, loudness and speed; single notes, rows, chords."
        ],
        figures={
            "variants": [
                {
                    "name": variant.name,
                    "part_s": variant.seconds,
                    "right": variant.right,
                    "replayed": variant.num_replayed / (variant.num_made * variant.steps),
                }
                for variant in variants
            ]
        },
    )
