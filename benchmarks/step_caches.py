"""What the benchmarks of step caches share: every policy at a few settings, and fewer steps without one, on the same
prompts. Each is judged by how far its latents are from those of all steps computed and, where a model ships with a
detector, by what its outputs show; its cost is the blocks that were computed, with the processor's time beside.

Calibrated policies are fitted here to the model that is measured, on other prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Options, Report, Table, median
from benchmarks.sides import SideProcess

TUNED: dict[str, Sequence[dict[str, Any]]] = {  # policy -> its settings
    "first_block": [{"threshold": value} for value in (0.05, 0.1, 0.2)],
    "dbcache": [{"lead_blocks": 2, "tail_blocks": 1, "threshold": value} for value in (0.05, 0.1, 0.2)],
    "taylorseer": [*({"interval": value} for value in (2, 3, 5)), {"interval": 3, "order": 2}],
    "teacache": [{"threshold": value} for value in (0.1, 0.2, 0.4)],
    "magcache": [{"threshold": value, "max_skips": 5} for value in (0.06, 0.12, 0.24)],
}
CALIBRATED = ("teacache", "magcache")
QUICK_STEPS, QUICK_POLICIES = (2, 6), ("first_block", "magcache")
COLUMNS = ("blocks computed", "CPU time", "distance", "distance of fewer steps", "on the front")
RIGHT_COLUMNS = ("judged right", "right of fewer steps")


@dataclass(slots=True)
class Variant:
    """policy: None is no step cache. keys: of the policy, as a YAML has them."""

    steps: int
    policy: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    cpu_s: float = 0.0  # of all outputs together, as the next two
    num_right: int = 0
    blocks: int = 0  # that were computed
    distances: list[float] = field(default_factory=list)  # relative L2 of each output's latents

    @property
    def name(self) -> str:
        words = ", ".join(f"{key} {value:g}" for key, value in self.keys.items())
        return f"{self.policy}: {words}" if self.policy else f"{self.steps} steps"

    @property
    def right(self) -> float:
        return self.num_right / len(self.distances)

    @property
    def distance(self) -> float:
        return median(self.distances)

    def figures(self) -> dict[str, Any]:
        numbers = {"blocks": self.blocks, "cpu_s": self.cpu_s, "distance": self.distance, "right": self.right}
        return {"name": self.name, "policy": self.policy, "steps": self.steps, "keys": self.keys, **numbers}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is measured. stage: the one with the step cache, of `num_blocks` blocks. prompts: count -> (words,
    what they mean). fitted_on: prompts of the calibration. is_right: (output, what was meant); None where nobody can
    judge.
    """

    suite: str
    config: str
    stage: str
    steps: int  # that a step cache works on
    fewer_steps: Sequence[int]
    num_blocks: int
    fitted_on: Sequence[str]
    prompts: Callable[[int], list[tuple[str, Any]]]
    is_right: Callable[[Any, Any], bool] | None = None
    params: dict[str, Any] = field(default_factory=dict)
    model: str | None = None  # the config's own
    looser: float = 1.0  # what thresholds of relative changes are multiplied by, where steps change more


class Measured:
    """The side that is measured: an Omni for each setting, one after the other."""

    def __init__(self, subject: Subject, count: int) -> None:
        self._subject = subject
        self._prompts = subject.prompts(count)
        self._fitted: dict[str, dict[str, Any]] = {}
        self._whole: list[Any] = []  # latents of all steps, by prompt

    def make(self, variant: Variant) -> Variant:
        """The variant with all prompts counted in. That of all steps comes first."""
        import torch

        subject = self._subject
        pipeline = self._pipeline({"policy": variant.policy or "none", **variant.keys, **self._numbers(variant.policy)})
        outputs, variant.cpu_s = self._outputs(pipeline, [words for words, _ in self._prompts], variant.steps)
        policy = pipeline.specs[subject.stage].policy
        num_skipped = subject.num_blocks - policy.num_lead_blocks - policy.num_tail_blocks
        found = [output.tensors[f"{subject.stage}.latents"] for output in outputs]
        self._whole = self._whole or found
        for output, latents, whole, (_, meant) in zip(outputs, found, self._whole, self._prompts, strict=True):
            did = output.metrics[subject.stage]
            variant.distances.append(float(torch.linalg.vector_norm(latents - whole) / torch.linalg.vector_norm(whole)))
            variant.blocks += did["steps"] * subject.num_blocks - did["cache_hits"] * num_skipped
            variant.num_right += subject.is_right is not None and subject.is_right(output, meant)
        return variant

    def _pipeline(self, cache: dict[str, Any]) -> Any:
        import json

        from vllm_omni.entrypoints.loading import open_pipeline

        subject = self._subject
        overrides = [
            f"{subject.stage}.cache={json.dumps(cache)}",
            f"outputs=[{subject.stage}, {subject.stage}.latents]",
        ]
        return open_pipeline(subject.config, model=subject.model, overrides=overrides, device="cpu", dtype="float32")

    def _outputs(self, pipeline: Any, prompts: Sequence[str], steps: int, seed: int = 0) -> tuple[list[Any], float]:
        """(the outputs, the processor's seconds), the process being warm."""
        from vllm_omni import DiffusionParams, Omni

        params = [
            DiffusionParams(seed=seed + index, num_inference_steps=steps, **self._subject.params)
            for index in range(len(prompts))
        ]
        with Omni(pipeline, progress=False) as omni:
            if not self._whole:
                omni.generate(self._subject.fitted_on[0], params[0])
            started = time.process_time()
            outputs = omni.generate(list(prompts), params)
            seconds = time.process_time() - started
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs, seconds

    def _numbers(self, policy: str | None) -> dict[str, Any]:
        """What is fitted to this model, for a policy that needs it."""
        from vllm_omni.entrypoints.calibration.fit import fit

        subject = self._subject
        if policy not in CALIBRATED:
            return {}
        if not self._fitted:
            pipeline = self._pipeline({"policy": "recording", "signal": "modulated_input"})
            self._outputs(pipeline, subject.fitted_on, subject.steps, seed=1000)
            spec = pipeline.specs[subject.stage]
            for name in CALIBRATED:
                keys = fit(name, spec.policy.records, subject.steps, degree=4).keys
                self._fitted[name] = {**keys, "fitted_on": spec.model.fingerprint()}
        return self._fitted[policy]


def in_turn(groups: Sequence[Sequence[tuple[str, Any]]], count: int) -> list[tuple[str, Any]]:
    """The first of every group, the second of every group, and so on."""
    return [prompt for group in zip(*groups, strict=True) for prompt in group][:count]


def run_subject(subject: Subject, options: Options, count: int, picture: Path) -> Report:
    """The suite of one model: its table, and a picture of the front."""
    from benchmarks.step_caches_plot import draw_front

    with SideProcess("vllm_omni", options.threads, Measured, subject, count) as us:
        variants = [us.call("make", variant)[1] for variant in grid(subject, options)]
    whole = variants[0]
    figures: dict[str, Any] = {"variants": [variant.figures() for variant in variants]}
    if not options.is_quick:
        draw_front(figures["variants"], f"{subject.suite}, {subject.steps} steps", picture)
    columns = ("variant", *COLUMNS, *(RIGHT_COLUMNS if subject.is_right else ()))
    title = f"Step caches at {subject.steps} steps, {count} outputs each"
    return Report(
        subject.suite,
        [Table(title, columns, [cells(variant, variants, whole, subject) for variant in variants])],
        notes=[
            f"Distance: relative L2 of the latents from those of all {subject.steps} steps, median. Fewer steps: the"
            " most of them, without a cache, that compute no more blocks. Front: nothing computes as few blocks and"
            " comes nearer.",
            time_note(variants, whole),
            f"![Distance against blocks computed]({picture.name})",
        ],
        figures=figures,
    )


def grid(subject: Subject, options: Options) -> list[Variant]:
    """All steps first, which the others are compared with; then fewer, then every policy."""
    fewer = [steps for steps in subject.fewer_steps if not options.is_quick or steps in QUICK_STEPS]
    tuned = {name: keys for name, keys in TUNED.items() if not options.is_quick or name in QUICK_POLICIES}
    cached = [
        Variant(subject.steps, policy, keys if policy == "magcache" else loosened(keys, subject.looser))
        for policy, settings in tuned.items()
        for keys in (settings[-1:] if options.is_quick else settings)
    ]
    return [Variant(subject.steps), *map(Variant, sorted(fewer, reverse=True)), *cached]


def loosened(keys: dict[str, Any], factor: float) -> dict[str, Any]:
    return {key: value * factor if key == "threshold" else value for key, value in keys.items()}


def cells(variant: Variant, variants: Sequence[Variant], whole: Variant, subject: Subject) -> list[str]:
    """A row of the table: name, COLUMNS and, where somebody judges, RIGHT_COLUMNS."""
    shares = [f"{variant.blocks / whole.blocks:.0%}", f"{variant.cpu_s / whole.cpu_s:.0%}"]
    fewer = None if variant.policy is None else as_cheap(variant, variants)
    compared = "" if fewer is None else f"{fewer.distance:.3g} ({fewer.name})"
    front = "yes" if is_on_front(variant, variants) else ""
    row = [variant.name, *shares, f"{variant.distance:.3g}", compared, front]
    if subject.is_right is None:
        return row
    return [*row, f"{variant.right:.1%}", "" if fewer is None else f"{fewer.right:.1%}"]


def as_cheap(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
    """The most steps without a cache that compute no more blocks."""
    plain = [other for other in variants if other.policy is None and other.blocks <= variant.blocks]
    return max(plain, key=lambda other: other.steps, default=None)


def is_on_front(variant: Variant, variants: Sequence[Variant]) -> bool:
    """Whether no other one is as cheap and as near, and better in one of the two."""
    mine = (variant.blocks, variant.distance)
    others = [(other.blocks, other.distance) for other in variants]
    return not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in others)


def time_note(variants: Sequence[Variant], whole: Variant) -> str:
    """How far the processor's time follows the blocks."""
    blocks, times = [v.blocks for v in variants], [v.cpu_s for v in variants]
    fixed = statistics.linear_regression(blocks, times).intercept
    return (
        f"Processor time follows the blocks that are computed with a correlation of"
        f" {statistics.correlation(blocks, times):.3f} over all variants; {fixed / whole.cpu_s:.0%} of the time of all"
        " steps is something else (text, decoder, embedding)."
    )
