"""The world of the tiny model, its detector, and what the shipped model draws and writes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from support.training import assert_one_command_that_resumes

from tools.tiny.common.muon import orthogonalise
from tools.tiny.image import train
from tools.tiny.image.detect import detect
from tools.tiny.image.evaluate import CASES, judge_case, prompts_for
from tools.tiny.image.judge import complaint, is_right
from tools.tiny.image.loose import is_held_out, loose
from tools.tiny.image.render import draw_scene
from tools.tiny.image.world import COLOURS, SHAPES, UNSEEN, Scene, Thing, canonical, sample_scene
from vllm_omni import DiffusionParams, Omni
from vllm_omni.utils.files import assets_folder

MAX_WEIGHTS_BYTES = 24_000_000


def test_the_detector_reads_what_was_drawn() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng, allow_unseen=True) for _ in range(150)]
    wrong = [(canonical(scene), reason) for scene in scenes if (reason := complaint(draw_scene(scene, rng), scene))]
    assert len(wrong) <= 1, wrong


def test_every_colour_and_shape_is_told_apart() -> None:
    rng = random.Random(1)
    for colour in COLOURS:
        for shape in SHAPES:
            for size in (None, "small", "large"):
                picture = draw_scene(Scene((Thing(colour, shape, size),)), rng)
                found = detect(picture).things
                assert [(thing.colour, thing.shape) for thing in found] == [(colour, shape)]


def test_a_picture_of_something_else_is_never_right() -> None:
    rng = random.Random(2)
    for _ in range(100):
        scene = sample_scene(rng)
        other = sample_scene(rng, num_things=len(scene.things))
        if set(scene.things) != set(other.things):
            assert not is_right(draw_scene(scene, rng), other), (canonical(scene), canonical(other))


def test_swapped_relations_missing_and_extra_things_are_wrong() -> None:
    rng = random.Random(3)
    red, blue = Thing("red", "circle"), Thing("blue", "square")
    picture = draw_scene(Scene((red, blue), "left of"), rng)
    assert is_right(picture, Scene((red, blue), "left of")) and is_right(picture, Scene((blue, red), "right of"))
    for wrong in (Scene((red, blue), "right of"), Scene((red, blue), "above"), Scene((red,)), Scene((red, blue, red))):
        assert not is_right(picture, wrong)
    assert not is_right(np.full((128, 128, 3), 128, np.uint8), Scene((red,)))
    assert not is_right(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8), Scene((red,)))


def test_unseen_pairs_never_occur_in_training_and_are_one_in_eight() -> None:
    rng = random.Random(4)
    assert len(UNSEEN) / (len(COLOURS) * len(SHAPES)) == 0.125
    assert not any(sample_scene(rng).has_unseen for _ in range(2000))


def test_loose_words_are_split_by_their_text() -> None:
    rng = random.Random(5)
    requests = {loose(sample_scene(rng), rng) for _ in range(4000)}
    assert 0.03 < sum(map(is_held_out, requests)) / len(requests) < 0.07


def test_orthogonalised_matrices_have_even_singular_values() -> None:
    for shape in ((64, 16), (16, 64), (32, 32)):
        values = torch.linalg.svdvals(
            orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float()
        )
        assert values.max() < 1.3 and values.median() > 0.6


@pytest.fixture(scope="module")
def image() -> Iterator[Omni]:
    with Omni("tiny_image.yaml", progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    with Omni("tiny_scene.yaml", progress=False) as loaded:
        yield loaded


def test_shipped_weights_are_small_and_complete() -> None:
    folder = assets_folder() / "tiny-image"
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= MAX_WEIGHTS_BYTES
    for name in ("model_index.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        assert (folder / name).is_file()


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_loose], ids=lambda case: case.name)
def test_the_shipped_model_draws_what_was_asked(image: Omni, case: object) -> None:
    """A small sample of what tools/tiny/image/evaluate.py measures; wide enough to pass at the stated goals."""
    share, wrong, _ = judge_case(image, case, 24, 77, {})  # type: ignore[arg-type]
    assert share >= 0.8, wrong


def test_loose_words_become_the_scene_and_its_picture(omni: Omni) -> None:
    case = next(case for case in CASES if case.is_loose)
    prompts = prompts_for(case, 24, 78)
    outputs = omni.generate([words for words, _ in prompts], DiffusionParams(seed=1))
    written = sum(output.text == canonical(scene) for output, (_, scene) in zip(outputs, prompts, strict=True))
    drawn = sum(
        is_right(np.asarray(output.images[0]), scene) for output, (_, scene) in zip(outputs, prompts, strict=True)
    )
    assert written >= 22 and drawn >= 19


def test_diffusers_draws_the_same_from_the_shipped_folder() -> None:
    prompt = "a red circle left of a blue square"
    pipeline = ZImagePipeline.from_pretrained(assets_folder() / "tiny-image", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 128, "width": 128, "num_inference_steps": 6, "guidance_scale": 1.0}
    expected = pipeline([prompt], generator=torch.Generator().manual_seed(5), **settings).images[0]
    with Omni("tiny_image.yaml", dtype="float32", progress=False) as image:
        output = image.generate(prompt, DiffusionParams(seed=5, **settings))[0]  # type: ignore[arg-type]
    assert output.error is None
    difference = np.abs(np.asarray(expected).astype(int) - np.asarray(output.images[0]).astype(int))
    assert difference.max() <= 2


def test_training_is_one_command_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way in a few steps, then once more without a result: only what is missing is made again."""
    asset = assert_one_command_that_resumes(train, tmp_path, "image", 4, monkeypatch)
    with Omni("tiny_scene.yaml", model=str(asset), progress=False) as omni:
        output = omni.generate("a red ball", DiffusionParams(num_inference_steps=1))[0]
    assert output.error is None and output.images[0].size == (128, 128)


def test_a_sheet_of_pictures_is_written(tmp_path: Path) -> None:
    from PIL import Image

    from tools.tiny.image.evaluate import sheet

    sheet([Image.new("RGB", (8, 8))] * 9).save(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (64, 16)
