"""`/v1/images` with OpenAI's own client."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from support.media import image_bytes, picture
from support.server import threads_of_the_server

from vllm_omni import DiffusionParams, Omni

PROMPT = "a red circle left of a blue square"


def opened(content: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content or "")))


def test_a_picture_is_the_one_that_omni_draws(client: OpenAI) -> None:
    answer = client.images.generate(model="tiny-image", prompt=PROMPT, extra_body={"seed": 3})
    with threads_of_the_server(), Omni("tiny_image", progress=False) as omni:
        image = omni.generate(PROMPT, DiffusionParams(seed=3))[0].images[0]
    assert answer.data is not None
    assert opened(answer.data[0].b64_json).tobytes() == image.tobytes()
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    assert answer.usage is not None and answer.usage.input_tokens > 0


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_asked_for(client: OpenAI, output_format: Any) -> None:
    answer = client.images.generate(model="tiny-image", prompt=PROMPT, n=2, output_format=output_format, size="96x64")
    images = [opened(item.b64_json) for item in answer.data or ()]
    assert [image.format for image in images] == [output_format.upper()] * 2
    assert [image.size for image in images] == [(96, 64)] * 2
    assert images[0].tobytes() != images[1].tobytes()


def test_a_stream_gives_previews_and_then_the_same_picture(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny-image", "prompt": PROMPT, "extra_body": {"seed": 3}}
    whole = client.images.generate(**options)
    events: list[Any] = list(client.images.generate(**options, stream=True, partial_images=3))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert whole.data is not None
    assert opened(events[-1].b64_json).tobytes() == opened(whole.data[0].b64_json).tobytes()
    assert events[-1].usage.total_tokens == events[-1].usage.input_tokens
    assert all(opened(event.b64_json).size == (128, 128) for event in events)


def test_a_file_says_how_it_was_made_and_not_the_callers_words(client: OpenAI) -> None:
    answer = client.images.generate(model="tiny-image", prompt=PROMPT, n=2, extra_body={"seed": 3})
    assert answer.data is not None
    said = [opened(item.b64_json).info["parameters"] for item in answer.data]
    assert "Seed: 3" in said[0] and "Seed: 4" in said[1] and "Steps: 9" in said[0]
    assert PROMPT not in said[0]
    again = client.images.generate(model="tiny-image", prompt=PROMPT, extra_body={"seed": 4})
    assert again.data is not None
    assert opened(again.data[0].b64_json).tobytes() == opened(answer.data[1].b64_json).tobytes()


def test_what_was_written_before_drawing_is_the_revised_prompt(client: OpenAI) -> None:
    answer = client.images.generate(model="tiny-omni", prompt="could you draw me a crimson ball")
    assert answer.data is not None and answer.data[0].revised_prompt == "scene: a red circle"


def test_a_prompt_of_which_no_picture_is_made_says_what_was_made(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no picture of it; it wrote: i am fine") as caught:
        client.images.generate(model="tiny-omni", prompt="how are you?")
    assert caught.value.code == "no_image"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"size": "100000x10000"}, "height"),
        ({"size": "big"}, None),
        ({"size": "0x64"}, None),
        ({"quality": "high"}, "quality"),
        ({"style": "vivid"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"response_format": "url"}, "response_format"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_format": "gif"}, "output_format"),
        ({"n": 11}, "n"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"guidance_scale": 1e9}}, "guidance_scale"),
        ({"extra_body": {"num_inference_steps": 10**6}}, "num_inference_steps"),
        ({"extra_body": {"extra_params": {"lyrics": "la"}}}, "extra.lyrics"),
        ({"extra_body": {"lora": {"name": "x"}}}, "lora.name"),
        ({"model": "tiny-audio"}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(client: OpenAI, options: dict[str, Any], param: Any) -> None:
    plain: dict[str, Any] = {"model": "tiny-image", "prompt": PROMPT}
    with pytest.raises(openai.BadRequestError) as caught:
        list(client.images.generate(**{**plain, **options}))
    assert param is None or caught.value.param == param


def pixels(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(opened(answer.data[0].b64_json)).astype(int)


def file(values: np.ndarray[Any, Any], name: str = "a.png") -> tuple[str, bytes, str]:
    return name, image_bytes(values.astype(np.uint8)), "image/png"


def test_an_edit_starts_from_the_picture_and_keeps_what_its_mask_keeps(client: OpenAI) -> None:
    before = pixels(client.images.generate(model="tiny-image", prompt=PROMPT, extra_body={"seed": 1}))
    half = np.dstack([before, np.full(before.shape[:2], 255)])
    half[:, before.shape[1] // 2 :, 3] = 0  # transparent, as OpenAI's masks say it
    words, options = "a red circle left of a green triangle", {"extra_body": {"seed": 2}}
    edited = pixels(
        client.images.edit(model="tiny-image", prompt=words, image=file(before), mask=file(half), **options)  # type: ignore[call-overload]
    )
    change = np.abs(edited - before).mean(axis=2)
    is_red, is_blue = (before[..., one] > before[..., other] + 60 for one, other in ((0, 2), (2, 0)))
    assert is_red.any() and is_blue.any()
    assert change[is_red].mean() < 15 < 60 < change[is_blue].mean()


def test_a_variation_is_like_its_picture(client: OpenAI) -> None:
    before = pixels(client.images.generate(model="tiny-image", prompt="a red circle", extra_body={"seed": 1}))
    extra = {"seed": 2, "strength": 0.3}
    varied = pixels(client.images.create_variation(model="tiny-image", image=file(before), extra_body=extra))
    assert np.abs(varied - before).mean() < 25


def test_no_path_of_the_servers_files_is_taken_for_a_picture(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(image_bytes(picture()))
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="tiny-image", prompt="x", extra_body={"extra_params": {"image": str(path)}})
    assert caught.value.param == "extra_params.image"


def test_a_form_is_checked_as_json_is(client: OpenAI) -> None:
    image = ("a.png", image_bytes(picture()), "image/png")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(model="tiny-image", prompt="x", image=image, extra_body={"strenght": 0.5})
    assert caught.value.param == "strenght"
