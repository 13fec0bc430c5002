"""Pictures of FLUX.2 [klein] stages against diffusers' pipelines, on random small weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.dit import BOTH, engine, pictures, run
from support.flux2 import picture, random_pipeline, states, task

from vllm_omni.params import DiffusionParams

# height, width, guidance, steps, text tokens, sizes of references
CASES: list[tuple[int | None, int | None, float, int, int, list[tuple[int, int]]]] = [
    (64, 64, 1.0, 4, 5, []),
    (32, 96, 4.0, 6, 33, [(64, 64)]),
    (64, 64, 1.0, 3, 7, [(70, 91), (128, 65)]),
    (96, 32, 2.5, 5, 40, [(64, 100), (64, 64), (80, 72)]),
    (None, None, 1.0, 2, 100, [(67, 99)]),
    (64, 64, 0.0, 1, 1, []),
    (64, 64, 4.0, 4, 5, []),
]


def given_references(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [picture(*size, seed=index) for index, size in enumerate(sizes)]


def params_of(index: int, **more: Any) -> DiffusionParams:
    height, width, guidance, steps, _, sizes = CASES[index]
    given: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": steps, "seed": index, **more}
    return DiffusionParams(guidance_scale=guidance, image=given_references(sizes) or None, **given)


def as_pixels(result: Any) -> np.ndarray:
    return (result.images[0] * 255).round().astype(int)


def drawn(pipeline: Any, index: int, **more: Any) -> np.ndarray:
    height, width, guidance, steps, length, sizes = CASES[index]
    given = dict(
        image=given_references(sizes) or None,
        prompt_embeds=states(length, index)[None],
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(index),
        output_type="np",
    )
    if "negative_prompt_embeds" in more:
        given["guidance_scale"] = guidance
    return as_pixels(pipeline(**{**given, **more}))


def submit(stage: Any, index: int, params: DiffusionParams) -> None:
    is_guided = params.guidance_scale is not None and params.guidance_scale > 1
    given = task(str(index), params, CASES[index][4], index, is_guided=is_guided)
    stage.spec.check(given.request, params, BOTH)
    stage.submit(given)


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    for key, pixels in expected.items():
        found = got[key][0].numpy().astype(int)
        assert found.shape == pixels.shape, key
        assert np.abs(found - pixels).max() <= 2, key
        assert pixels.std() > 10, "a flat picture would prove nothing"


def test_pictures_of_one_batch_equal_the_reference_pipeline(tmp_path: Path) -> None:
    """Sizes, step counts, guidance, short and long texts, none to three references, all in ONE batch."""
    pipeline, stage = random_pipeline(tmp_path), engine(tmp_path)
    negative = states(9, 1000)[None]
    expected = {str(i): drawn(pipeline, i, negative_prompt_embeds=negative) for i in range(len(CASES))}
    for index in range(len(CASES)):
        submit(stage, index, params_of(index))
    assert_equal(pictures(run(stage)), expected)
