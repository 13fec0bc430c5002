"""Pictures of FLUX.2 [klein] stages against diffusers' pipelines, on random small weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline
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
    return DiffusionParams(**{"guidance_scale": guidance, "image": given_references(sizes) or None, **given})


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


@pytest.mark.parametrize("index", [2, 3])
def test_references_are_seen_each_at_its_place(tmp_path: Path, index: int) -> None:
    random_pipeline(tmp_path)
    whole = params_of(index)
    assert isinstance(whole.image, list)
    others = {"none": None, "first": whole.image[:1], "turned": whole.image[::-1]}
    seen = {}
    for name, image in [("whole", whole.image), *others.items()]:
        stage = engine(tmp_path)
        submit(stage, index, params_of(index, image=image))
        seen[name] = pictures(run(stage))[str(index)].int()
    for name in others:
        assert (seen["whole"] - seen[name]).abs().max() > 10, name


def test_kept_references_give_the_pictures_of_the_reference_pipeline(tmp_path: Path) -> None:
    """All in one batch; without references it is the plain pipeline."""
    pipeline, stage = random_pipeline(tmp_path, keeps_references=True), engine(tmp_path)
    expected = {str(index): drawn(pipeline, index) for index in range(len(CASES))}
    for index in range(len(CASES)):
        submit(stage, index, params_of(index, guidance_scale=1.0))
    assert_equal(pictures(run(stage)), expected)


def mask_of(height: int, width: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 3, 0, width, height // 2))
    return mask


@pytest.mark.parametrize("strength", [None, 0.5, 1.0])
@pytest.mark.parametrize("class_name", ["Flux2KleinPipeline", "Flux2KleinInpaintPipeline"])
def test_masked_pictures_equal_the_inpainting_pipeline(tmp_path: Path, strength: float | None, class_name: str) -> None:
    """In one batch, with and without a reference and guidance, beside one that starts from noise alone."""
    plain = random_pipeline(tmp_path)
    pipeline = Flux2KleinInpaintPipeline(**plain.components)
    pipeline.set_progress_bar_config(disable=True)
    if class_name == "Flux2KleinInpaintPipeline":
        pipeline.save_pretrained(tmp_path)
    stage = engine(tmp_path)
    expected = {}
    for index, (size, guidance, sizes) in enumerate(
        [((64, 96), 1.0, []), ((75, 91), 4.0, []), ((64, 96), 4.0, [(70, 91)])]
    ):
        source, mask, references = picture(*size, seed=50), mask_of(*size), given_references(sizes)
        given = {} if strength is None else {"strength": strength}
        masked: dict[str, Any] = dict(height=None, width=None, num_inference_steps=5, **given)
        submit(
            stage,
            index,
            params_of(index, **{**masked, "guidance_scale": guidance}, image=[source, *references], mask=mask),
        )
        result = pipeline(
            image=source,
            mask_image=mask,
            image_reference=references[0] if references else None,
            prompt_embeds=states(CASES[index][4], index)[None],
            negative_prompt_embeds=states(9, 1000)[None],
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(index),
            output_type="np",
            num_inference_steps=5,
            **given,
        )
        expected[str(index)] = as_pixels(result)
    if class_name == "Flux2KleinPipeline":
        expected["3"] = drawn(plain, 3, negative_prompt_embeds=states(9, 1000)[None])
        submit(stage, 3, params_of(3))
    assert_equal(pictures(run(stage)), expected)


def test_a_picture_is_the_same_alone_in_a_crowd_and_in_another_order(tmp_path: Path) -> None:
    random_pipeline(tmp_path)
    source, mask = picture(64, 96, seed=50), mask_of(64, 96)
    more = {4: dict(image=source, mask=mask, guidance_scale=4.0)}
    alone = {}
    for index in range(len(CASES)):
        stage = engine(tmp_path)
        submit(stage, index, params_of(index, **more.get(index, {})))
        alone.update(pictures(run(stage)))
    for order in (range(len(CASES)), reversed(range(len(CASES)))):
        stage = engine(tmp_path)
        for index in order:
            submit(stage, index, params_of(index, **more.get(index, {})))
        crowd = pictures(run(stage))
        for key, pixels in alone.items():
            assert (crowd[key].int() - pixels.int()).abs().max() <= 1, key
