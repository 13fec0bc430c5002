"""Adapters from a request's words to its answer: by name, by path, by stage, on the command line and at the server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import ZImageTransformer2DModel
from openai import BadRequestError, OpenAI
from PIL import Image
from support.loopback import http
from support.lora import random_lora
from support.server import ServerProcess
from transformers import Qwen3ForCausalLM

from vllm_omni import DiffusionParams, LoRA, Omni, OmniOutput, SamplingParams
from vllm_omni.config.shipped import find_config
from vllm_omni.entrypoints.cli import main
from vllm_omni.entrypoints.cli.generate import named_lora
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.params import StageParams
from vllm_omni.utils.files import resolve_model_folder

PROMPT = "a red circle left of a blue square"
TINY = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 3}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped picture model with adapters for the picture and for the words, in one folder each."""
    folder = tmp_path_factory.mktemp("adapters")
    model = resolve_model_folder("asset://tiny-image")
    (folder / "pictures").mkdir()
    (folder / "words").mkdir()
    transformer = ZImageTransformer2DModel.from_pretrained(
        model / "transformer", dtype=torch.float32, low_cpu_mem_usage=False
    )
    random_lora(transformer, 1, std=0.3).save(folder / "pictures" / "wild.safetensors")
    encoder = Qwen3ForCausalLM.from_pretrained(model / "text_encoder", dtype=torch.float32)
    of_words = random_lora(encoder, 2, chosen=lambda name: "layers" in name, std=0.3)
    of_words.save(folder / "words" / "loud.safetensors", of_words.as_peft(""))
    tree = yaml.safe_load(Path(find_config("tiny_image")).read_text())
    tree["stages"]["image"]["lora"] = {"folders": [str(folder / "pictures")]}
    tree["stages"]["text"]["lora"] = {"folders": [str(folder / "words")]}
    path = folder / "adapted.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def omni(config: Path) -> Iterator[Omni]:
    with Omni(str(config), progress=False) as loaded:
        yield loaded


def draw(omni: Omni, params: StageParams | dict[str, StageParams]) -> np.ndarray:
    return pixels(omni.generate(PROMPT, params)[0])


def pixels(output: OmniOutput) -> np.ndarray:
    assert output.error is None, output.error
    return np.asarray(output.images[0]).astype(int)


def test_an_adapter_by_name_path_or_mapping_is_the_same(omni: Omni, config: Path) -> None:
    plain = draw(omni, DiffusionParams(**TINY))
    path = str(config.parent / "pictures" / "wild.safetensors")
    ways: list[Any] = [
        [LoRA("wild")],
        [{"name": "wild"}],
        {"name": "wild", "int_id": 7},
        [LoRA(path=path)],
        [{"name": "a label", "path": path, "scale": 1}],
    ]
    found = [draw(omni, DiffusionParams(**TINY, lora=way)) for way in ways]
    assert all(np.array_equal(picture, found[0]) for picture in found)
    assert np.abs(found[0] - plain).mean() > 3
    assert np.array_equal(draw(omni, DiffusionParams(**TINY, lora=[LoRA("wild", scale=0)])), plain)


def test_words_with_an_adapter_are_encoded_and_kept_by_themselves(omni: Omni) -> None:
    image = DiffusionParams(**TINY)
    plain = draw(omni, image)
    loud: dict[str, StageParams] = {"image": image, "text": SamplingParams(lora=[LoRA("loud")])}
    first, second = (omni.generate(PROMPT, loud)[0] for _ in range(2))
    assert np.abs(pixels(first) - plain).mean() > 3 and np.array_equal(pixels(first), pixels(second))
    assert not first.metrics["text"].get("cached") and second.metrics["text"]["cached"]
    assert np.array_equal(draw(omni, image), plain)


def test_one_batch_of_plain_and_adapted_requests_equals_each_alone(omni: Omni) -> None:
    params = [DiffusionParams(**TINY, lora=loras) for loras in (None, [LoRA("wild")], [], [LoRA("wild", scale=-1)])]
    alone = [draw(omni, each) for each in params]
    together = omni.generate([PROMPT] * len(params), params)
    for picture, output in zip(alone, together, strict=True):
        assert np.abs(picture - pixels(output)).max() <= 1


BAD: list[tuple[Any, str]] = [
    ([LoRA("loud")], "did you mean|known: wild"),  # of the other stage
    ([LoRA("../words/loud")], "without a folder"),
    ([LoRA(path="/etc/passwd")], "lora.folders"),
]


@pytest.mark.parametrize(("loras", "words"), BAD)
def test_a_bad_adapter_is_named_and_others_go_on(omni: Omni, loras: Any, words: str) -> None:
    good = DiffusionParams(**TINY)
    expected = draw(omni, good)
    bad, other = omni.generate([PROMPT, PROMPT], [DiffusionParams(**TINY, lora=loras), good])
    assert isinstance(bad.error, InvalidRequestError)
    with pytest.raises(InvalidRequestError, match=words):
        raise bad.error
    assert np.array_equal(pixels(other), expected)


@pytest.mark.parametrize(
    "value",
    [
        "wild",
        [{"nme": "wild"}],
        [{}],
        [LoRA("wild")] * 2,
        [LoRA(str(index)) for index in range(9)],
        [{"name": "wild", "scale": float("nan")}],
        [{"name": "wild", "scale": 11}],
        [{"name": 3}],
        [{"name": ""}],
        7,
    ],
)
def test_what_names_no_adapter_is_refused(value: Any) -> None:
    for kind in (DiffusionParams, SamplingParams):
        with pytest.raises(InvalidRequestError, match="lora"):
            kind(lora=value)


def test_a_stage_without_folders_refuses_adapters() -> None:
    with Omni("tiny_image", progress=False, overrides=["image.lora=null"]) as plain:
        output = plain.generate(PROMPT, DiffusionParams(**TINY, lora=[LoRA("wild")]))[0]
    assert output.error is not None and "lora.folders" in str(output.error)


def test_the_command_line_names_adapters(config: Path, omni: Omni, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    size = ["--seed", "3", "--steps", "2", "--height", "64", "--width", "64"]
    assert main(["generate", PROMPT, "--config", str(config), "-q", "-o", str(file), *size, "--lora", "wild:0.5"]) == 0
    expected = draw(omni, DiffusionParams(**TINY, lora=[LoRA("wild", scale=0.5)]))
    assert np.array_equal(np.asarray(Image.open(file)).astype(int), expected)
    assert MediaMetadata.parse(Image.open(file).info["parameters"]).parameters["lora"] == ["wild:0.5"]


def test_a_name_on_the_command_line_may_hold_colons() -> None:
    assert named_lora("a:b") == LoRA("a:b")
    assert named_lora("a:b:-2") == LoRA("a:b", scale=-2)
    assert named_lora("here/a.safetensors:0.5") == LoRA(path="here/a.safetensors", scale=0.5)


@pytest.fixture(scope="module")
def server(config: Path) -> Iterator[ServerProcess]:
    with ServerProcess([f"adapted={config}"]) as process:
        yield process


@pytest.mark.parametrize("route", ["images", "chat"])
def test_the_server_takes_adapters_by_name(server: ServerProcess, omni: Omni, route: str) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)
    body = {**TINY, "lora": [{"name": "wild", "scale": 0.5}]}
    if route == "images":
        answer = client.images.generate(model="adapted", prompt=PROMPT, extra_body=body)
        assert answer.data is not None
        content = answer.data[0].b64_json or ""
    else:
        messages: Any = [{"role": "user", "content": PROMPT}]
        made = client.chat.completions.create(model="adapted", messages=messages, extra_body=body)
        content = made.choices[0].message.content[0]["image_url"]["url"].partition(",")[2]  # type: ignore[index]
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)
    expected = draw(omni, DiffusionParams(**TINY, lora=[LoRA("wild", scale=0.5)]))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        ([{"name": "wild", "path": "/etc/passwd"}], "lora"),
        ([{"path": "/etc/passwd"}], "lora"),
        ([{"name": "gone"}], None),
        ([{"name": "wild", "scale": 99}], "lora"),
    ],
)
def test_the_server_refuses_paths_and_unknown_names(server: ServerProcess, lora: Any, param: str | None) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)
    with pytest.raises(BadRequestError, match="lora") as caught:
        client.images.generate(model="adapted", prompt=PROMPT, extra_body={**TINY, "lora": lora})
    assert param is None or str(caught.value.param).startswith(param)


def test_a_form_takes_adapters_as_json(server: ServerProcess) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 90, 90)).save(picture, "png")
    answers = []
    for lora in ('[{"name": "wild"}]', "[]", "no json"):
        fields = {"model": "adapted", "prompt": PROMPT, "seed": "3", "num_inference_steps": "2", "size": "64x64"}
        answers.append(
            http.post(
                f"{server.base_url}/images/edits",
                data={**fields, "lora": lora},
                files={"image": ("x.png", picture.getvalue(), "image/png")},
                timeout=120,
            )
        )
    assert [answer.status_code for answer in answers] == [200, 200, 400], [answer.text[:300] for answer in answers]
    adapted, plain = (answer.json()["data"][0]["b64_json"] for answer in answers[:2])
    assert adapted != plain
