"""Previews and progress as a caller of `stream` sees them, of the models that ship."""

from __future__ import annotations

import asyncio
import timeit
from collections.abc import Callable, Iterator

import pytest
import torch
from PIL import Image
from support.ssim import ssim

from vllm_omni import AsyncOmni, DiffusionParams, Omni, OmniOutput, RequestStatus, SamplingParams
from vllm_omni.errors import InvalidRequestError
from vllm_omni.models.z_image.spec import ZImageSpec
from vllm_omni.utils.files import assets_folder

SCENES = ["a red circle left of a blue square", "a large pink star", "a green triangle above a yellow square"]
LIKE = 0.8  # structural similarity of a preview, from the second step on, and its picture; half the other scenes: 0.75
SEED = 7


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    with Omni("tiny_image", progress=False) as loaded:
        yield loaded


def previews(parts: list[OmniOutput]) -> list[Image.Image]:
    return [preview for part in parts for preview in part.previews]


@pytest.mark.parametrize("scene", SCENES)
def test_previews_look_like_the_picture_that_follows(omni: Omni, scene: str) -> None:
    *parts, final = omni.stream(scene, DiffusionParams(seed=SEED, num_previews=4))
    shown = previews(parts)
    assert len(shown) == 4 and all(preview.mode == "RGB" for preview in shown)
    assert all(preview.size == final.images[0].size for preview in shown)
    later = [ssim(preview, final.images[0]) for preview in shown[1:]]
    assert min(later) > LIKE, later
    others = omni.generate([other for other in SCENES if other != scene], DiffusionParams(seed=SEED))
    for other in others:
        assert ssim(shown[-1], final.images[0]) > ssim(shown[-1], other.images[0])


def test_a_preview_costs_a_small_part_of_a_decode() -> None:
    """Measured: 1.2% of it, 6% of a step, for the smallest of VAEs."""
    model = ZImageSpec(assets_folder() / "tiny-image").load(torch.device("cpu"), torch.float32)
    latents = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))

    def seconds(function: Callable[[], object]) -> float:
        with torch.inference_mode():
            return min(timeit.repeat(function, number=1, repeat=7))

    assert 8 * seconds(lambda: model.preview(latents)) < seconds(lambda: next(model.decode(latents, slice(None))))


def test_the_final_output_is_the_same_without_previews(omni: Omni) -> None:
    (expected,) = omni.generate(SCENES[0], DiffusionParams(seed=SEED))
    *parts, final = omni.stream(SCENES[0], DiffusionParams(seed=SEED, num_previews=10))
    assert len(previews(parts)) == 8, "the config's nine steps, but the last"
    assert final.images[0].tobytes() == expected.images[0].tobytes()
    assert not final.previews and not final.progress
    (asked,) = omni.generate(SCENES[0], DiffusionParams(seed=SEED, num_previews=3))
    assert asked.images[0].tobytes() == expected.images[0].tobytes() and not asked.previews


def test_previews_of_several_outputs_stand_in_the_order_of_the_pictures(omni: Omni) -> None:
    params = DiffusionParams(seed=11, num_outputs=3, num_previews=2, height=96, width=64)  # whose pictures differ
    *parts, final = omni.stream(SCENES[1], params)
    sets = [part.results["image"].previews for part in parts if part.previews]
    assert [len(found) for found in sets] == [3, 3] and len(final.images) == 3
    for index, preview in enumerate(sets[-1]):
        likeness = [ssim(preview, image) for image in final.images]
        assert preview.size == (64, 96) and likeness.index(max(likeness)) == index


def test_every_partial_output_tells_how_far_each_stage_is(omni: Omni) -> None:
    *parts, _ = omni.stream(SCENES[0], DiffusionParams(seed=SEED, num_inference_steps=5, num_outputs=2))
    steps = [(part.progress["image"].step, part.progress["image"].num_steps) for part in parts]
    assert steps == [(step, 10) for step in range(1, 11)] and not previews(parts)


def test_the_stages_of_a_graph_tell_it_side_by_side_and_only_pictures_are_shown() -> None:
    with Omni("tiny_omni", progress=False) as omni:
        params = {"image": DiffusionParams(seed=SEED, num_previews=3, num_inference_steps=6)}
        *parts, final = omni.stream("show me a scarlet ball and play a C4 on a string", params)
    assert final.error is None and len(final.images) == 1 and len(final.audios) == 1
    assert all(part.progress for part in parts) and set(parts[-1].progress) >= {"thinker", "image", "sound"}
    for stage in parts[-1].progress:
        done = [part.progress[stage].step / part.progress[stage].num_steps for part in parts if stage in part.progress]
        assert done == sorted(done) and done[0] > 0 and done[-1] <= 1, stage
    assert parts[-1].progress["image"].step == 6 and {stage for part in parts for stage in part.results} >= {"image"}
    assert [len(part.results["image"].previews) for part in parts if part.previews] == [1, 1, 1]
    assert all(set(part.results) == {"image"} for part in parts if part.previews)


@pytest.mark.parametrize("config", ["tiny_audio", "adapter"])
def test_where_nothing_can_be_shown_asking_for_it_is_refused(config: str) -> None:
    adapter = {
        "stages": {"image": {"kind": "diffusers", "model": "asset://tiny-image", "output": "image"}},
        "outputs": ["image"],
    }
    with Omni(adapter if config == "adapter" else config, progress=False) as omni:
        (output,) = omni.stream("C4", DiffusionParams(num_previews=2))
        assert output.status is RequestStatus.REJECTED and isinstance(output.error, InvalidRequestError)
        assert "num_previews: got 2, expected 0" in str(output.error)
        size = {"height": 32, "width": 32} if config == "adapter" else {}
        *_, output = omni.stream("C4", DiffusionParams(num_previews=0, num_inference_steps=2, **size))
        assert output.error is None


def test_a_text_tells_its_tokens() -> None:
    with Omni("qwen3", model="asset://tiny-image/text_encoder", overrides=TOKENIZER, progress=False) as omni:
        *parts, _ = omni.stream("draw me a golden hoop", SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    assert [(part.progress["text"].step, part.progress["text"].num_steps) for part in parts] == [
        (step, 6) for step in range(1, 7)
    ]


TOKENIZER = ["text.tokenizer=asset://tiny-image/tokenizer"]


def test_a_stream_that_is_left_between_previews_leaves_nothing_behind(omni: Omni) -> None:
    stream = omni.stream(SCENES[0], DiffusionParams(seed=SEED, num_previews=4))
    assert any(part.previews for _, part in zip(range(4), stream, strict=False))
    stream.close()
    assert omni.get_status()["stages"]["image"]["tasks"] == 0
    *parts, final = omni.stream(SCENES[0], DiffusionParams(seed=SEED, num_previews=4))
    assert len(previews(parts)) == 4 and final.error is None


def test_previews_reach_asyncio_in_order_too() -> None:
    async def main() -> list[OmniOutput]:
        async with AsyncOmni("tiny_image") as omni:
            return [part async for part in omni.stream(SCENES[0], DiffusionParams(seed=SEED, num_previews=2))]

    *parts, final = asyncio.run(asyncio.wait_for(main(), 60.0))
    likeness = [ssim(preview, final.images[0]) for preview in previews(parts)]
    assert len(likeness) == 2 and min(likeness) > LIKE
