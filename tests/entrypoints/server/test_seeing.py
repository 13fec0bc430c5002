"""A server of a model that sees: a chat with a picture in it, and what it refuses."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from openai import OpenAI
from support.loopback import http
from support.media import image_bytes, picture, sound_bytes, tone, video_bytes
from support.seeing import Reference, save_tiny_vl, user
from support.server import ServerProcess

PIXELS = picture(24, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vl(tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    large = save_tiny_vl(folder.parent / "large", patch_size=14)  # which sees more than 512x512 pixels
    configs = {name: folder.parent / f"{name}.yaml" for name in ("seeing", "large")}
    for model, config in zip((folder, large), configs.values(), strict=True):
        stage = {"kind": "ar", "model": str(model), "task": "generate", "dtype": "float32"}
        graph = {"name": "a", "stages": {"text": stage}, "outputs": ["text"], "limits": {"max_images": 1}}
        config.write_text(yaml.safe_dump(graph))
    with ServerProcess([f"{name}={config}" for name, config in configs.items()]) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)


def image_part(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}


def messages(*parts: Any) -> Any:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def test_a_chat_with_a_picture_is_answered_as_by_the_reference(client: OpenAI, folder: Path) -> None:
    reference = Reference(folder)
    expected, _ = reference.write(user("See ", PIXELS, " what?"), 6)
    answer = client.chat.completions.create(
        model="seeing",
        messages=messages("See ", image_part(image_bytes(PIXELS)), " what?"),
        max_tokens=6,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].message.content == reference.processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == reference.inputs(user("See ", PIXELS, " what?"))["input_ids"].shape[1]


def test_the_list_of_models_says_that_it_sees(server: ServerProcess) -> None:
    for model in server.get("/v1/models").json()["data"]:
        assert set(model["input_modalities"]) == {"text", "image", "video"}


def test_little_detail_is_as_many_pixels_as_512_times_512(client: OpenAI) -> None:
    content = image_bytes(picture(600, 840))
    tokens = {}
    for detail in ("auto", "high", "low"):
        part = image_part(content)
        part["image_url"]["detail"] = detail
        answer = client.chat.completions.create(model="large", messages=messages(part), max_tokens=1)
        assert answer.usage is not None
        tokens[detail] = answer.usage.prompt_tokens
    assert tokens["auto"] - tokens["low"] == (588 * 840 - 420 * 588) / 28**2  # a token has 28x28 pixels
    assert tokens["high"] == tokens["auto"]


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([image_part(image_bytes(PIXELS))] * 2, "got 2 images, expected at most 1"),
        ([image_part(b"none")], "no whole image"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}], "got audio, which this model"),
    ],
)
def test_what_it_cannot_read_is_refused(parts: Any, complaint: str, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=complaint):
        client.chat.completions.create(model="seeing", messages=messages(*parts))


SMALL = image_bytes(PIXELS)
FILM = video_bytes([picture(32, 48, seed) for seed in range(6)])
DAMAGED = {  # some of it shows in the header, some only when a stage decodes it
    "a picture that is cut": ("image_url", SMALL[:-60], "image", "damaged or truncated"),
    "a picture with other bytes": ("image_url", SMALL[:60] + bytes(40) + SMALL[100:], "image", "damaged"),
    "a sound as a picture": ("image_url", sound_bytes(tone()), "image", "no whole image"),
    "a video that is cut": ("video_url", FILM[:3000], "video", "no whole video"),
    "a video with other bytes": ("video_url", FILM[:48] + bytes(4000) + FILM[4048:], "video", "damaged"),
    "a picture as a video": ("video_url", SMALL, "video", "no whole video"),
    "text as base64": ("image_url", "data:image/png;base64,%%%", "image_url", "no base64"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "source", "field", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_media_are_the_callers_fault_and_end_no_other_request(
    client: OpenAI, server: ServerProcess, kind: str, source: Any, field: str, words: str, stream: bool
) -> None:
    url = source if isinstance(source, str) else f"data:x/y;base64,{base64.b64encode(source).decode()}"
    body = {
        "model": "seeing",
        "messages": messages({"type": kind, kind: {"url": url}}, "?"),
        "max_tokens": 2,
        "stream": stream,
    }
    answer = http.post(f"{server.base_url}/chat/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert error["code"] == "invalid_media" and error["param"] == f"messages[0].content[0].{field}"
    assert error["message"].startswith(error["param"]) and words in error["message"]
    assert client.chat.completions.create(model="seeing", messages=messages("Hello"), max_tokens=2).choices
