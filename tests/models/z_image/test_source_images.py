"""Pictures that start from a picture, and keep what a mask keeps: against diffusers' pipelines on the same folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline
from PIL import Image
from support.ar import make_tokenizer
from support.dit import random_transformer, random_vae
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_omni import DiffusionParams, Omni, OmniOutput
from vllm_omni.errors import InvalidRequestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Z-Image checkpoint with every part, as diffusers writes it."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    parts = (FlowMatchEulerDiscreteScheduler(shift=3.0), random_vae(), Qwen3ForCausalLM(config), make_tokenizer())
    path = tmp_path_factory.mktemp("checkpoint")
    ZImagePipeline(*parts, random_transformer(axes_lens=[1024, 64, 64])).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def omni(folder: Path) -> Iterator[Omni]:
    with Omni(model=str(folder), progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Any]:
    loaded = {
        name: kind.from_pretrained(folder, dtype=torch.float32)
        for name, kind in (("image", ZImageImg2ImgPipeline), ("mask", ZImageInpaintPipeline))
    }
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


def photo(height: int, width: int, seed: int) -> Image.Image:
    """Smooth colours, so that it survives an autoencoder of any kind."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def half_mask(height: int, width: int) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    return Image.fromarray(mask)


# size of the picture, height and width that are asked for, strength, guidance, steps, whether there is a mask
CASES: list[tuple[tuple[int, int], tuple[int | None, int | None], float | None, float, int, bool]] = [
    ((64, 64), (None, None), None, 0.0, 5, False),
    ((70, 93), (None, None), 0.5, 4.0, 4, False),
    ((64, 96), (64, 96), 1.0, 0.0, 2, False),
    ((64, 64), (None, None), None, 0.0, 4, True),
    ((96, 48), (None, None), 0.7, 4.0, 3, True),
]


def given(index: int) -> dict[str, Any]:
    """Keys of DiffusionParams, `image` and the rest."""
    size, (height, width), strength, guidance, steps, has_mask = CASES[index]
    named = dict(height=height, width=width, strength=strength, guidance_scale=guidance, num_inference_steps=steps)
    mask = {"mask": half_mask(*size)} if has_mask else {}
    return {"image": photo(*size, index), **mask, **{key: value for key, value in named.items() if value is not None}}


def drawn(omni: Omni, indices: list[int], extra: int = 0) -> dict[int, np.ndarray]:
    """extra: how many pictures of words alone are made in the same batch."""
    params = [DiffusionParams(seed=index, **given(index)) for index in indices]
    params += [DiffusionParams(seed=9, height=32, width=64, guidance_scale=2.0, num_inference_steps=3)] * extra
    outputs = omni.generate(["a red circle"] * len(params), params)
    return {index: pixels(output) for index, output in zip(indices, outputs, strict=False)}


def pixels(output: OmniOutput) -> np.ndarray:
    assert output.error is None, output.error
    return np.asarray(output.images[0]).astype(int)


def of_reference(references: dict[str, Any], index: int) -> np.ndarray:
    named = given(index)
    pipeline = references["mask" if "mask" in named else "image"]
    image, mask = named.pop("image"), named.pop("mask", None)
    if "height" not in named:  # the pipelines take the picture's own size only where it is a multiple
        named["height"], named["width"] = (side // 16 * 16 for side in reversed(image.size))
    source = image.resize((named["width"], named["height"]), Image.Resampling.LANCZOS)
    masks = {} if mask is None else {"mask_image": mask}
    generator = torch.Generator().manual_seed(index)
    made = pipeline(prompt=["a red circle"], image=source, generator=generator, **masks, **named).images[0]
    return np.asarray(made).astype(int)


def test_pictures_from_pictures_equal_the_reference_in_one_batch(omni: Omni, references: dict[str, Any]) -> None:
    got = drawn(omni, list(range(len(CASES))), extra=2)
    for index, picture in got.items():
        expected = of_reference(references, index)
        assert expected.std() > 5, "a flat picture would prove nothing"
        assert np.abs(picture - expected).max() <= 2, CASES[index]


def test_alone_in_a_crowd_and_in_another_order(omni: Omni) -> None:
    indices = list(range(len(CASES)))
    alone = {index: drawn(omni, [index])[index] for index in indices}
    for index, picture in drawn(omni, indices[::-1], extra=1).items():
        assert np.abs(picture - alone[index]).max() <= 1, index


def test_every_output_of_a_request_starts_from_its_own_draw(omni: Omni) -> None:
    params = DiffusionParams(seed=4, num_outputs=2, **given(0))
    first, second = omni.generate("a red circle", params)[0].images
    (alone,) = omni.generate("a red circle", DiffusionParams(seed=5, **given(0)))[0].images
    assert np.array_equal(np.asarray(second), np.asarray(alone))
    assert not np.array_equal(np.asarray(first), np.asarray(second))


def test_what_the_mask_keeps_is_the_picture_as_the_autoencoder_gives_it_back(omni: Omni) -> None:
    kept = drawn(omni, [3])[3][:, :24]
    other = given(3) | {"num_inference_steps": 2}
    again = pixels(omni.generate("another thing", DiffusionParams(seed=3, **other))[0])[:, :24]
    assert np.abs(kept - again).mean() < 3, "far from the mask's edge, words and steps change next to nothing"


def test_the_same_picture_is_encoded_once_whatever_brings_it(omni: Omni, tmp_path: Path) -> None:
    image = photo(64, 64, 77)
    path = tmp_path / "photo.png"
    image.save(path)
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    sources = [image, str(path), path, path.read_bytes(), uri, np.asarray(image)]
    params = DiffusionParams(seed=2, num_inference_steps=2, guidance_scale=0.0)
    prompts: list[dict[str, Any]] = [{"prompt": "x", "image": source, "strength": 0.8} for source in sources]
    made = [pixels(output) for output in omni.generate(prompts, params)]
    assert all(np.array_equal(made[0], each) for each in made)


def transparent() -> Image.Image:
    image = photo(64, 64, 3).convert("RGBA")
    image.putalpha(Image.fromarray(255 - np.asarray(half_mask(64, 64))))
    return image


def test_a_mask_may_be_grey_colour_or_transparent(omni: Omni) -> None:
    masks = [half_mask(64, 64), half_mask(64, 64).convert("RGB"), half_mask(64, 64).convert("1"), transparent()]
    params = [DiffusionParams(seed=3, **(given(3) | {"mask": mask})) for mask in masks]
    made = [pixels(output) for output in omni.generate(["x"] * len(params), params)]
    assert all(np.array_equal(made[0], each) for each in made)


def cmyk() -> bytes:
    file = io.BytesIO()
    photo(64, 64, 5).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


def animated() -> bytes:
    file = io.BytesIO()
    photo(64, 64, 6).save(file, "GIF", save_all=True, append_images=[photo(64, 64, 7)])
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("source", [cmyk(), animated(), photo(64, 64, 5).convert("P"), photo(64, 64, 5).convert("LA")])
def test_unusual_pictures_are_read(omni: Omni, source: Any) -> None:
    """Of an animation the first picture."""
    pixels(omni.generate("x", DiffusionParams(seed=1, image=source, num_inference_steps=2, guidance_scale=0.0))[0])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"image": photo(1, 1, 0)}, "image: got 1x1 pixels, expected 16 to"),
    ({"image": photo(16, 2000, 0)}, "image: got 2000x16 pixels"),
    ({"image": png(photo(64, 64, 0))[:-40]}, "image: got an image that is damaged or truncated"),
    ({"image": b"no picture"}, "image: got a file that is no whole image"),
    ({"image": "https://example.org/cat.png"}, "an address, and nothing is fetched"),
    ({"image": "data:image/png;base64,???"}, "image: got text that is no base64"),
    ({"image": [photo(64, 64, 0)] * 2}, "image: got a list of 2, expected the one to start from"),
    ({"image": Image.new("L", (8000, 8000))}, "image: got 8000x8000 pixels"),
    ({"image": photo(64, 64, 0), "mask": half_mask(32, 64)}, "mask: got 64x32 pixels, expected 64x64"),
    ({"image": photo(64, 64, 0), "mask": 3.5}, "mask: got float, expected a path"),
    ({"image": photo(64, 64, 0), "strength": 0}, "strength: got 0, which leaves none of 2 steps"),
    ({"mask": half_mask(64, 64)}, "mask: got one without an image"),
    ({"strength": 0.5}, "strength: got one without an image"),
]


@pytest.mark.parametrize(("keys", "words"), BAD)
def test_what_cannot_be_is_said_and_harms_nobody(omni: Omni, keys: dict[str, Any], words: str) -> None:
    params = [DiffusionParams(seed=1, num_inference_steps=2, guidance_scale=0.0, **each) for each in (keys, {})]
    bad, good = omni.generate(["x", "x"], [params[0], DiffusionParams(seed=1, height=32, width=32, **SHORT)])
    assert bad.error is not None and words in str(bad.error), bad.error
    assert good.error is None


SHORT: dict[str, Any] = dict(num_inference_steps=2, guidance_scale=0.0)


def test_a_picture_that_lies_on_its_side_is_turned_before_it_is_measured(omni: Omni) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    photo(32, 96, 1).save(file, "JPEG", exif=exif)
    made = omni.generate("x", DiffusionParams(seed=1, image=file.getvalue(), **SHORT))[0]
    assert made.images[0].size == (32, 96)


def test_a_strength_that_is_no_number_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="strength"):
        DiffusionParams(strength=float("nan"))
