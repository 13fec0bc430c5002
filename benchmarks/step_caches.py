"""What the two benchmarks of step caches share: variants that make the same prompts, part by part in turn, so that
everything that is timed is judged too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import Options, with_spread
from benchmarks.sides import SideProcess

THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
COLUMNS = ("steps replayed", "judged right", "right without a cache in the same time")


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

    @property
    def replayed(self) -> float:
        return self.num_replayed / (self.num_made * self.steps)

    def figures(self) -> dict[str, Any]:
        return {"name": self.name, "part_s": self.seconds, "right": self.num_right, "replayed": self.replayed}


@dataclass(frozen=True, slots=True)
class Subject:
    """A shipped model that is judged. stage: the one with the step cache. prompts: count -> (words, what they mean) of
    all cases of the evaluation in turn. is_right: (output, what was meant).
    """

    config: str
    stage: str
    warm_up: str
    prompts: Callable[[int], list[tuple[str, Any]]]
    is_right: Callable[[Any, Any], bool]


class JudgedModel:
    """The side that is measured: one Omni for each threshold."""

    def __init__(self, subject: Subject, count: int) -> None:
        self._subject = subject
        self._prompts = subject.prompts(count)
        self._omnis: dict[float | None, Any] = {}

    def make(self, variant: Variant, start: int, stop: int) -> tuple[float, int, int]:
        """(seconds, outputs judged right, replayed steps) of the prompts start .. stop - 1."""
        from vllm_omni import DiffusionParams

        omni = self.omni(variant.threshold)
        chosen = self._prompts[start:stop]
        seeds = range(start, start + len(chosen))
        params = [DiffusionParams(seed=seed, num_inference_steps=variant.steps) for seed in seeds]
        started = time.perf_counter()
        outputs = omni.generate([words for words, _ in chosen], params)
        seconds = time.perf_counter() - started
        right = sum(self._subject.is_right(output, meant) for output, (_, meant) in zip(outputs, chosen, strict=True))
        return seconds, right, sum(output.metrics[self._subject.stage]["cache_hits"] for output in outputs)

    def omni(self, threshold: float | None) -> Any:
        from vllm_omni import Omni

        if threshold not in self._omnis:
            cache = f"{{policy: first_block, threshold: {threshold}}}" if threshold is not None else "{policy: none}"
            overrides = [f"{self._subject.stage}.cache={cache}"]
            self._omnis[threshold] = Omni(self._subject.config, overrides=overrides, device="cpu", progress=False)
            self._omnis[threshold].generate(self._subject.warm_up)
        return self._omnis[threshold]


def in_turn(groups: Sequence[Sequence[tuple[str, Any]]], count: int) -> list[tuple[str, Any]]:
    """The first of every group, the second of every group, and so on."""
    return [prompt for group in zip(*groups, strict=True) for prompt in group][:count]


def grid(options: Options, steps: Sequence[int], cached_steps: Sequence[int]) -> list[Variant]:
    """Numbers of steps without a cache, and some of them with each threshold."""
    plain = [Variant(number, None) for number in (steps[:2] if options.is_quick else steps)]
    cached = [
        Variant(number, threshold)
        for number in ((4,) if options.is_quick else cached_steps)
        for threshold in (THRESHOLDS[-1:] if options.is_quick else THRESHOLDS)
    ]
    return plain + cached


def measure(us: SideProcess, variants: Sequence[Variant], count: int, part: int) -> None:
    """Fills the variants in."""
    for start in range(0, count, part):
        for variant in variants:
            seconds, right, replayed = us.call("make", variant, start, start + part)[1]
            variant.seconds.append(seconds)
            variant.num_made += part
            variant.num_right += right
            variant.num_replayed += replayed


def cells(variant: Variant, variants: Sequence[Variant]) -> list[str]:
    """A row of the table: name, outputs a second, and COLUMNS."""
    rates = [variant.num_made / len(variant.seconds) / seconds for seconds in variant.seconds]
    shares = [f"{variant.replayed:.0%}", f"{variant.right:.1%}", baseline(variant, variants)]
    return [variant.name, with_spread(rates), *shares]


def baseline(variant: Variant, variants: Sequence[Variant]) -> str:
    """What the most steps without a cache give that take no longer."""
    if variant.threshold is None:
        return ""
    plain = [other for other in variants if other.threshold is None and other.made_s <= variant.made_s]
    if not plain:
        return "none is as fast"
    best = max(plain, key=lambda other: other.steps)
    return f"{best.right:.1%} ({best.steps} steps)"
