"""`/v1/images/edits` and `/variations` for a stage that takes an image: a pipeline of diffusers, hosted as it is."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import openai
import pytest
import torch
import yaml
from openai import OpenAI
from PIL import Image
from support.media import image_bytes, picture
from support.server import ServerProcess, threads_of_the_server
from support.tiny_parts import unet
from support.tiny_pipelines import save, stable_diffusion

STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("edits")
    torch.manual_seed(0)
    save(stable_diffusion("StableDiffusionImg2ImgPipeline"), root / "img2img")
    save(stable_diffusion("StableDiffusionInpaintPipeline", unet=unet(in_channels=9)), root / "inpaint")
    return {name: root / name for name in ("img2img", "inpaint")}


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[OpenAI]:
    configs = []
    for name, folder in folders.items():
        config = folder.with_suffix(".yaml")
        stages = {"image": {"kind": "diffusers", "model": str(folder)}}
        config.write_text(yaml.safe_dump({"name": name, "stages": stages, "outputs": ["image"]}))
        configs.append(f"{name}={config}")
    with ServerProcess(configs) as server:
        yield OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)


def file(pixels: Any, name: str = "a.png") -> tuple[str, bytes, str]:
    return name, image_bytes(pixels), "image/png"


def opened(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))


def test_an_edit_is_what_the_pipeline_makes_of_picture_and_prompt(client: OpenAI, folders: dict[str, Path]) -> None:
    pixels = picture(32, 32)
    extra = {"seed": 5, "strength": 0.75, "num_inference_steps": 4}
    answer = client.images.edit(model="img2img", prompt="a cat", image=file(pixels), extra_body=extra)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders["img2img"])
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    with threads_of_the_server():
        plain = pipeline(
            "a cat", image=Image.fromarray(pixels), strength=0.75, num_inference_steps=4, generator=generator
        )
    assert np.array_equal(opened(answer), np.asarray(plain.images[0]))


def test_a_mask_says_what_is_drawn_anew(client: OpenAI) -> None:
    pixels = picture(32, 32)
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[:, 16:] = 255
    extra = {"seed": 5, **STEPS}
    with_mask = client.images.edit(
        model="inpaint",
        prompt="a cat",
        image=file(pixels),
        mask=file(mask),
        size="32x32",
        extra_body=extra,  # type: ignore[call-overload]
    )
    assert opened(with_mask).shape == (32, 32, 3)
    with pytest.raises(openai.BadRequestError, match="mask"):
        client.images.edit(model="img2img", prompt="a cat", image=file(pixels), mask=file(mask), extra_body=STEPS)


def test_an_edit_streams_as_a_generation_does(client: OpenAI) -> None:
    options: Any = {"model": "img2img", "prompt": "a cat", "extra_body": {"seed": 5, **STEPS}}
    whole = client.images.edit(image=file(picture(32, 32)), **options)
    events: list[Any] = list(client.images.edit(image=file(picture(32, 32)), stream=True, **options))
    assert [event.type for event in events] == ["image_edit.completed"]
    assert whole.data is not None and events[0].b64_json == whole.data[0].b64_json


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (("a.png", b"no picture", "image/png"), "no whole image"),
        (("a.png", b"", "image/png"), "image"),
        (("a.png", image_bytes(picture(32, 32))[:-60], "image/png"), "damaged or truncated"),
    ],
)
def test_what_is_no_picture_is_refused(client: OpenAI, image: Any, expected: str) -> None:
    with pytest.raises(openai.BadRequestError, match=expected) as raised:
        client.images.edit(model="img2img", prompt="a cat", image=image, extra_body=STEPS)
    assert (raised.value.code, raised.value.param) == ("invalid_media", "image[0]")


def test_a_missing_picture_is_named(client: OpenAI) -> None:
    response = client._client.post("/images/edits", files={"prompt": (None, "a cat")})
    assert response.status_code == 400 and response.json()["error"]["param"] == "image"
