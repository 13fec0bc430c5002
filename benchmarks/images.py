"""Pictures per second of the shipped model against diffusers.ZImagePipeline on the same folder.

Both draw the same prompts with the same seeds, steps, guidance and dtype. The peer gets its best use: pictures of one
size go into one call. New prompts at every repeat, so that no cache of prompts helps us.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import SideProcess, duels
from tools.tiny.image.world import canonical, sample_scene

CONFIG = "tiny_image.yaml"
FOLDER = "asset://tiny-image"
NATIVE = (128, 128)
MIXED = ((128, 128), (96, 96), (128, 160), (160, 128), (112, 144), (96, 128), (144, 144), (160, 96))
COLUMNS = ("case", "ours, pictures/s", "diffusers, pictures/s", "ours / diffusers", "largest pixel difference")


@dataclass(frozen=True, slots=True)
class Case:
    """sizes: (height, width) of each request."""

    sizes: tuple[tuple[int, int], ...]
    steps: int
    guidance: float

    def prompts(self, repeat: int) -> list[str]:
        rng = random.Random(repeat)
        return [canonical(sample_scene(rng)) for _ in self.sizes]

    def seeds(self, repeat: int) -> list[int]:
        return [1000 * repeat + index for index in range(len(self.sizes))]


class Ours:
    """All requests in one call of Omni.generate."""

    def __init__(self, dtype: str) -> None:
        from vllm_omni import Omni

        self._omni = Omni(CONFIG, device="cpu", dtype=dtype, progress=False)

    def defaults(self) -> tuple[int, float]:
        """Steps and guidance of the shipped config."""
        defaults = self._omni.config.stages["image"].defaults
        return defaults["num_inference_steps"], defaults["guidance_scale"]

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        from vllm_omni import DiffusionParams

        params = [
            DiffusionParams(
                height=height, width=width, num_inference_steps=case.steps, guidance_scale=case.guidance, seed=seed
            )
            for (height, width), seed in zip(case.sizes, case.seeds(repeat), strict=True)
        ]
        outputs = self._omni.generate(case.prompts(repeat), params)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [np.asarray(output.images[0]) for output in outputs]


class Diffusers:
    """One call for each size."""

    def __init__(self, dtype: str) -> None:
        import torch
        from diffusers import ZImagePipeline
        from diffusers.utils import logging
        from transformers.utils import logging as text_logging

        from vllm_omni.utils.files import resolve_model_folder
        from vllm_omni.utils.precision import DTYPES

        logging.disable_progress_bar()
        text_logging.disable_progress_bar()
        self._generator = torch.Generator
        self._pipeline = ZImagePipeline.from_pretrained(resolve_model_folder(FOLDER)).to(DTYPES[dtype])
        self._pipeline.set_progress_bar_config(disable=True)

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        prompts, seeds = case.prompts(repeat), case.seeds(repeat)
        pictures: dict[int, np.ndarray] = {}
        for height, width in dict.fromkeys(case.sizes):
            chosen = [index for index, size in enumerate(case.sizes) if size == (height, width)]
            drawn = self._pipeline(
                prompt=[prompts[index] for index in chosen],
                height=height,
                width=width,
                num_inference_steps=case.steps,
                guidance_scale=case.guidance,
                generator=[self._generator().manual_seed(seeds[index]) for index in chosen],
            ).images
            pictures.update(zip(chosen, map(np.asarray, drawn), strict=True))
        return [pictures[index] for index in range(len(case.sizes))]


def run(options: Options, limits: Limits | None = None) -> Report:
    with (
        SideProcess("vllm_omni", options.threads, Ours, options.dtype) as us,
        SideProcess("diffusers", options.threads, Diffusers, options.dtype) as peer,
    ):
        memory = [["after loading", *(f"{side.peak_memory_mb():.0f}" for side in (us, peer))]]
        found = duels(us, peer, cases(options, *us.call("defaults")[1]), largest_difference, options)
        memory.append(["after all cases", *(f"{side.peak_memory_mb():.0f}" for side in (us, peer))])
    return Report(
        "images",
        [
            Table(f"Pictures per second, {options.dtype}", COLUMNS, [duel.cells() for duel in found]),
            Table("Peak memory, MiB", ("", "ours", "diffusers"), memory),
        ],
        notes=[] if limits is None else [limits.picture_note(options.dtype)],
        figures={"duels": [duel.figures() for duel in found], "peak_memory_mb": memory},
    )


def cases(options: Options, steps: int, guidance: float) -> list[tuple[str, int, Case]]:
    """(name, pictures, case) of everything that is measured."""
    counts = (2,) if options.is_quick else (1, 8, 32)
    steps = 2 if options.is_quick else steps
    guidances = (guidance,) if options.is_quick else tuple(dict.fromkeys((guidance, 0.0, 2.0)))
    found = []
    for scale in guidances:
        for words, sizes in (("128x128", [NATIVE]), ("mixed sizes", MIXED)):
            for count in counts:
                if count > 1 or len(sizes) == 1:
                    case = Case(tuple(islice(cycle(sizes), count)), steps, scale)
                    found.append((f"{count} x {words}, guidance {scale:g}, {steps} steps", count, case))
    return found


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> str:
    """Over all pictures, of 255."""
    pairs: Any = zip(ours, theirs, strict=True)
    return f"{max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)} of 255"
