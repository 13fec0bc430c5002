"""The native Qwen-Image stage against diffusers' pipelines, on random small weights in float32: text to image, and the
editing of one to three pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from support.dit import BOTH, engine, pictures, run, spec, states, task
from support.qwen_image import random_pipeline

from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.messages import StageDone, StageFailed, StageProgress
from vllm_omni.models.qwen_image import geometry, vae
from vllm_omni.params import DiffusionParams


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


# What starts from a picture: its (width, height), the size that is asked for, strength, guidance, steps, with a mask.
SOURCES: list[tuple[tuple[int, int], tuple[int, int] | None, float, float, int, bool]] = [
    ((64, 64), None, 0.6, 1.0, 5, False),
    ((93, 70), None, 0.5, 4.0, 4, False),
    ((50, 80), (64, 96), 1.0, 1.0, 3, False),
    ((64, 64), None, 0.8, 4.0, 5, True),
    ((48, 96), None, 1.0, 2.0, 3, True),
]


def half_mask(width: int, height: int) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    return Image.fromarray(mask)


def test_pictures_from_pictures_and_within_masks_equal_the_reference_pipelines(tmp_path: Path) -> None:
    pipeline, stage = random_pipeline(tmp_path), engine(tmp_path)
    kinds = {False: QwenImageImg2ImgPipeline, True: QwenImageInpaintPipeline}
    references = {is_masked: kind(**pipeline.components) for is_masked, kind in kinds.items()}
    found = {}
    for seed, (size, asked, strength, guidance, steps, is_masked) in enumerate(SOURCES):
        image, mask = random_image(size, seed), half_mask(*size)
        height, width = asked or (size[1] // 16 * 16, size[0] // 16 * 16)
        params = DiffusionParams(
            image=image,
            mask=mask if is_masked else None,
            strength=strength,
            height=height if asked else None,
            width=width if asked else None,
            guidance_scale=guidance,
            num_inference_steps=steps,
            seed=seed,
        )
        stage.spec.check(task(str(seed), params).request, params, BOTH)
        stage.submit(task(str(seed), params, 5 + seed, seed))
        references[is_masked].set_progress_bar_config(disable=True)
        found[seed] = references[is_masked](
            image=image,
            **({"mask_image": mask} if is_masked else {}),
            prompt_embeds=states(5 + seed, seed)[None],
            negative_prompt_embeds=states(9, 1000)[None],
            true_cfg_scale=guidance,
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
    got = pictures(run(stage))
    for seed, picture in found.items():
        expected_pixels = (picture * 255).round().astype(int)
        assert np.abs(got[str(seed)][0].numpy().astype(int) - expected_pixels).max() <= 2, SOURCES[seed]
        assert expected_pixels.std() > 10, "a flat picture would prove nothing"


# Pictures to edit are (width, height), with EDITED_AREA on both sides so small that tests are quick.
SMALL_AREA = 192 * 192
EDITS = [
    Case(11, 3, 4.0, (64, 96), ((60, 60),)),
    Case(20, 4, 1.0, (64, 64), ((75, 40), (48, 75))),
    Case(7, 2, 3.0, (96, 32), ((60, 60), (81, 64), (300, 148))),
    Case(5, 4, 4.0, (96, 64)),
    Case(9, 3, 4.0, (64, 96), ((60, 60),)),
]


@pytest.fixture(params=[False, True], ids=["plain", "zero_cond_t"])
def edits(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    monkeypatch.setattr(geometry, "EDITED_AREA", SMALL_AREA)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SMALL_AREA)
    return random_pipeline(tmp_path, "QwenImageEditPlusPipeline", zero_cond_t=request.param), tmp_path


def of_words(pipeline: Any) -> Any:
    """What makes pictures of words with the parts of a pipeline that edits."""
    parts = {name: part for name, part in pipeline.components.items() if name != "processor"}
    made = QwenImagePipeline(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def test_edits_and_pictures_of_words_in_one_batch_equal_the_reference_pipelines(edits: tuple[Any, Path]) -> None:
    """One to three pictures to edit, and none."""
    pipeline, folder = edits
    got = drawn(engine(folder), EDITS, range(len(EDITS)))
    for seed, case in enumerate(EDITS):
        picture = expected(pipeline if case.edited else of_words(pipeline), case, seed)
        assert np.abs(got[seed] - picture).max() <= 2, case
        assert picture.std() > 10, "a flat picture would prove nothing"


def test_an_edit_without_a_size_has_the_form_of_its_last_picture(tmp_path: Path) -> None:
    """At the published area, with a VAE of 32 pixels a latent, so that 1024 x 1024 pixels are 256 tokens."""
    pipeline = random_pipeline(tmp_path, "QwenImageEditPlusPipeline", num_halvings=5, base_dim=1)
    case = Case(7, 2, 1.0, None, ((75, 48),))
    picture = expected(pipeline, case, 0)
    got = drawn(engine(tmp_path), [case], [0])[0]
    assert got.shape == picture.shape == (832, 1280, 3)
    assert np.abs(got - picture).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1024, 1024), (1080, 1920), (3000, 400), (77, 1234), (512, 511)])
def test_pictures_to_edit_are_scaled_as_diffusers_scales_them(size: tuple[int, int]) -> None:
    height, width = size
    wide, high = pipeline_qwenimage_edit_plus.calculate_dimensions(1024 * 1024, width / height)
    assert geometry.ImageGeometry(vae_scale=8).edited_size(height, width) == (high, wide)


CROWD = [replace(case, steps=case.steps + 6) for case in EDITS]  # enough steps that some are like those before
CROWD_THRESHOLD = 0.35


@pytest.mark.parametrize("edits, policy", [(False, "none"), (True, "none"), (True, "first_block")], indirect=["edits"])
def test_the_same_picture_alone_in_a_crowd_and_in_another_order(edits: tuple[Any, Path], policy: str) -> None:
    stage = engine(edits[1], policy=policy, threshold=CROWD_THRESHOLD if policy == "first_block" else None)
    alone = {seed: drawn(stage, CROWD, [seed])[seed] for seed in range(len(CROWD))}
    for order in (range(len(CROWD)), [3, 1, 4, 0, 2]):
        for seed, picture in drawn(stage, CROWD, list(order)).items():
            assert np.abs(picture - alone[seed]).max() <= 1, (order, seed)


@pytest.mark.parametrize("edits", [True], indirect=True)
def test_first_block_reuses_some_steps_of_a_crowd(edits: tuple[Any, Path]) -> None:
    """What the crowd above is worth: some rows are computed while others are not."""
    stage = engine(edits[1], policy="first_block", threshold=CROWD_THRESHOLD)
    submit(stage, CROWD, range(len(CROWD)))
    hits = [event.metrics["cache_hits"] for event in run(stage).values() if isinstance(event, StageDone)]
    assert len(hits) == len(CROWD) and 0 < sum(hits) < sum(case.steps - 1 for case in CROWD)


@pytest.mark.parametrize("edits", [False], indirect=True)
def test_a_picture_is_encoded_once_for_all_requests_that_edit_it(
    edits: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = engine(edits[1])
    vae, sizes = stage.model.vae, []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: sizes.append(pixels.shape) or encode(pixels))
    drawn(stage, EDITS, range(len(EDITS)))
    drawn(stage, EDITS, [1, 4])
    pictures = {(size, index) for case in EDITS for index, size in enumerate(case.edited)}
    assert len(sizes) == len(pictures) == 5


def test_previews_are_of_the_size_of_the_picture(tmp_path: Path) -> None:
    random_pipeline(tmp_path)
    stage = engine(tmp_path)
    params = replace(WORDS[1].params(0), num_previews=2)
    stage.submit(task("0", params, 5))
    shown = []
    while not shown or not isinstance(shown[-1], StageDone):
        shown += stage.step()
    previews = [event.previews for event in shown if isinstance(event, StageProgress) and event.previews is not None]
    assert [tuple(preview.shape) for preview in previews] == [(1, 32, 96, 3)] * 2


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("QwenImagePipeline", {"image": [random_image((64, 64), 0)]}, "image: got a list of 1, expected the one to start"),
    ("QwenImagePipeline", {"image": random_image((64, 9), 0)}, "image: got 64x9 pixels, expected 16 a side, or height"),
    ("QwenImagePipeline", {"image": random_image((64, 64), 0), "strength": 0.0}, "strength: got 0, which leaves none"),
    ("QwenImagePipeline", {"height": 40}, "height: got 40, expected a multiple of 16"),
    ("QwenImagePipeline", {"height": 16_000, "width": 16_000}, "height * width"),
    ("QwenImagePipeline", {"strength": 0.5}, "strength: got one without an image"),
    ("QwenImagePipeline", {"duration_s": 5.0}, "duration_s: Qwen-Image does not read it"),
    ("QwenImageEditPlusPipeline", {"strength": 0.5}, "strength: Qwen-Image does not read it"),
    ("QwenImageEditPlusPipeline", {"mask": random_image((64, 64), 0)}, "mask: Qwen-Image does not read it"),
    ("QwenImagePipeline", {"extra": {"true_cfg_scale": 4.0}}, "extra.true_cfg_scale: unknown key"),
    ("QwenImagePipeline", {"guidance_scale": 1.0, "negative_prompt": "blur"}, "negative_prompt: guidance_scale 1"),
    ("QwenImagePipeline", {"guidance_scale": 1e6}, "guidance_scale"),
    ("QwenImagePipeline", {"num_inference_steps": 1}, "num_inference_steps: got 1, expected at least 2"),
    ("QwenImageEditPlusPipeline", {"image": []}, "image: got 0, expected 1 to 8"),
    ("QwenImageEditPlusPipeline", {"image": [random_image((64, 64), 0)] * 9}, "image: got 9, expected 1 to 8"),
    (
        "QwenImageEditPlusPipeline",
        {"image": [random_image((64, 64), 0), b"no"]},
        "image[1]: got a file that is no",
    ),
    (
        "QwenImageEditPlusPipeline",
        {"image": random_image((5000, 1), 0)},
        "image: got 5000x1 pixels, which is too",
    ),
    ("QwenImageEditPipeline", {"image": [random_image((64, 64), 0)] * 2}, "image: got 2, expected 1 to 1"),
]


@pytest.mark.parametrize("kind, fields, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_what_cannot_be_run_is_refused(tmp_path: Path, kind: str, fields: dict[str, Any], message: str) -> None:
    random_pipeline(tmp_path, kind)
    params = DiffusionParams(**fields)
    with pytest.raises(InvalidRequestError) as refused:
        spec(tmp_path).check(task("0", params).request, params, BOTH)
    assert message in str(refused.value)


@pytest.mark.parametrize("length", [0, 4095])
def test_a_prompt_of_no_or_too_many_tokens_fails_alone(tmp_path: Path, length: int) -> None:
    random_pipeline(tmp_path)
    stage = engine(tmp_path)
    stage.submit(task("bad", WORDS[0].params(0), length))
    stage.submit(task("good", WORDS[0].params(0), 5))
    events = run(stage)
    assert isinstance(events["bad"], StageFailed) and f"got {length} tokens" in str(events["bad"].error)
    assert isinstance(events["good"], StageDone)


@pytest.mark.parametrize(
    "part, change, key",
    [
        ("vae", {"z_dim": 4}, "latents_mean"),
        ("vae", {"input_channels": 4}, "input_channels"),
        ("vae", {"latents_std": [0.0] * 8}, "latents_std"),
        ("vae", {"temperal_downsample": "no"}, "temperal_downsample"),
        ("transformer", {"out_channels": 4, "in_channels": 16}, "z_dim"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "_class_name"),
        ("scheduler", {"max_shift": "much"}, "max_shift"),
        ("scheduler", {"max_image_seq_len": 256}, "max_image_seq_len"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, part: str, change: dict[str, Any], key: str) -> None:
    random_pipeline(tmp_path)
    file = tmp_path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=key):
        spec(tmp_path)


def test_a_stage_decodes_large_pictures_in_tiles_as_diffusers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "SAMPLE_SIZE", 32)
    pipeline = random_pipeline(tmp_path, num_halvings=1)
    cases = [Case(5, 2, 4.0, (48, 64)), Case(7, 2, 1.0, (32, 32))]
    found = drawn(engine(tmp_path, vae_tiling="always"), cases, [0, 1])
    whole = drawn(engine(tmp_path), cases, [0, 1])
    pipeline.vae.enable_tiling(32, 32, 24, 24)
    assert np.abs(found[0] - expected(pipeline, cases[0], 0)).max() <= 2
    assert not np.array_equal(found[0], whole[0]) and np.array_equal(found[1], whole[1]), "what fits a tile is whole"
