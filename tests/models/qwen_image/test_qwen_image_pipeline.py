"""The native Qwen-Image stage against diffusers' pipelines, on random small weights in float32: text to image, and the
editing of one to three pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from support.dit import BOTH, engine, pictures, run, states, task
from support.qwen_image import random_pipeline

from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.messages import StageDone, StageFailed, StageProgress
from vllm_omni.params import DiffusionParams

EDIT_HALVINGS = 5  # so that a picture to edit, of 1024 x 1024 pixels, is 256 tokens


@dataclass(frozen=True)
class Case:
    """One request; sizes of pictures to edit are (width, height)."""

    length: int  # text tokens
    steps: int
    guidance: float
    size: tuple[int, int] | None = None  # height, width
    edited: tuple[tuple[int, int], ...] = ()

    def params(self, seed: int) -> DiffusionParams:
        height, width = self.size or (None, None)
        images = self.images()
        return DiffusionParams(
            height=height,
            width=width,
            guidance_scale=self.guidance,
            num_inference_steps=self.steps,
            seed=seed,
            image=images[0] if len(images) == 1 else images or None,
        )

    def images(self) -> list[Image.Image]:
        return [random_image(size, seed) for seed, size in enumerate(self.edited)]


def random_image(size: tuple[int, int], seed: int) -> Image.Image:
    """Coarse colours with fine noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size)
    noise = generator.integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def expected(pipeline: Any, case: Case, seed: int) -> np.ndarray:
    height, width = case.size or (None, None)
    picture = pipeline(
        **({"image": case.images()} if case.edited else {}),
        prompt_embeds=states(case.length, seed)[None],
        negative_prompt_embeds=states(9, 1000)[None],
        true_cfg_scale=case.guidance,
        height=height,
        width=width,
        num_inference_steps=case.steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    return (picture * 255).round().astype(int)


def submit(stage: DiffusionEngine, cases: Sequence[Case], seeds: Sequence[int]) -> None:
    for seed in seeds:
        request = task(str(seed), cases[seed].params(seed), cases[seed].length, seed)
        stage.spec.check(request.request, request.params, BOTH)
        stage.submit(request)


def drawn(stage: DiffusionEngine, cases: Sequence[Case], seeds: Sequence[int]) -> dict[int, np.ndarray]:
    submit(stage, cases, seeds)
    return {int(key): picture[0].numpy().astype(int) for key, picture in pictures(run(stage)).items()}


WORDS = [
    Case(5, 4, 1.0, (64, 64)),
    Case(33, 6, 4.0, (32, 96)),
    Case(7, 3, 2.5, (64, 64)),
    Case(40, 5, 4.0, (96, 32)),
    Case(100, 2, 0.0, (48, 80)),
    Case(5, 8, 4.0, (64, 64)),
]


def test_pictures_of_one_batch_equal_the_reference_pipeline(tmp_path: Path) -> None:
    """Sizes, step counts, guidance, short and long texts, all in ONE batch."""
    pipeline, stage = random_pipeline(tmp_path), engine(tmp_path)
    got = drawn(stage, WORDS, range(len(WORDS)))
    for seed, case in enumerate(WORDS):
        picture = expected(pipeline, case, seed)
        assert np.abs(got[seed] - picture).max() <= 2, case
        assert picture.std() > 10, "a flat picture would prove nothing"


# Pictures to edit are of forms that are whole patches of the small VAE at about 1024 x 1024 pixels.
EDITS = [
    Case(11, 3, 4.0, (128, 192), ((60, 60),)),
    Case(20, 4, 1.0, (128, 128), ((75, 48), (48, 75))),
    Case(7, 2, 3.0, None, ((60, 60), (81, 64), (75, 48))),
    Case(5, 4, 4.0, (192, 128)),
    Case(9, 3, 4.0, (128, 192), ((60, 60),)),
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "zero_cond_t"])
def edits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("edit")
    kind = "QwenImageEditPlusPipeline"
    return random_pipeline(folder, kind, num_halvings=EDIT_HALVINGS, zero_cond_t=request.param), folder


def test_edits_and_pictures_of_words_in_one_batch_equal_the_reference_pipelines(edits: tuple[Any, Path]) -> None:
    """One to three pictures to edit, and none, which diffusers' pipeline of words draws with the same parts."""
    pipeline, folder = edits
    parts = {name: part for name, part in pipeline.components.items() if name != "processor"}
    of_words = QwenImagePipeline(**parts)
    of_words.set_progress_bar_config(disable=True)
    got = drawn(engine(folder), EDITS, range(len(EDITS)))
    for seed, case in enumerate(EDITS):
        picture = expected(pipeline if case.edited else of_words, case, seed)
        assert got[seed].shape == picture.shape
        assert np.abs(got[seed] - picture).max() <= 2, case
        assert picture.std() > 10, "a flat picture would prove nothing"
