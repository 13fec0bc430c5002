"""The whole way from words to pixels, against diffusers' ZImagePipeline on the same folder; and against itself
elsewhere.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image
from support.ar import make_tokenizer
from support.dit import random_transformer, random_vae
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_omni import DiffusionParams, Omni, OmniOutput

TEXT_WIDTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Z-Image checkpoint with every part, as diffusers writes it."""
    torch.manual_seed(0)
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=320,
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.2,
            eos_token_id=2,
        )
    )
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        random_vae(),
        text_encoder,
        make_tokenizer(),
        random_transformer(axes_lens=[1024, 64, 64]),
    )
    path = tmp_path_factory.mktemp("checkpoint")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def omni(folder: Path) -> Iterator[Omni]:
    with Omni(model=str(folder), progress=False) as loaded:
        yield loaded


CASES = [
    ("a red circle left of a blue square", None, 64, 64, 0.0, 4),
    ("", None, 32, 96, 1.0, 3),
    ("日本の夜、ネオン — café ñ 🌈", "blurry", 64, 64, 4.0, 3),
    ("one " * 300, None, 96, 32, 4.0, 2),
    ("a red circle", "", 48, 48, 0.0, 5),
    ("the end of the world", "日本", 64, 80, 1.0, 1),
]


def request(index: int) -> tuple[dict[str, str], DiffusionParams]:
    prompt, negative, height, width, guidance, steps = CASES[index]
    params = DiffusionParams(
        height=height,
        width=width,
        guidance_scale=guidance,
        num_inference_steps=steps,
        seed=index,
        negative_prompt=negative,
    )
    return {"prompt": prompt}, params


def pixels(output: OmniOutput) -> np.ndarray:
    assert output.error is None, output.error
    return np.asarray(output.images[0]).astype(int)


def drawn(omni: Omni, indices: list[int]) -> dict[int, np.ndarray]:
    prompts, params = zip(*(request(index) for index in indices), strict=True)
    outputs = omni.generate(list(prompts), list(params))
    return {index: pixels(output) for index, output in zip(indices, outputs, strict=True)}


def test_pictures_of_one_batch_equal_the_reference_pipeline(omni: Omni, reference: ZImagePipeline) -> None:
    got = drawn(omni, list(range(len(CASES))))
    for index, (prompt, negative, height, width, guidance, steps) in enumerate(CASES):
        picture = reference(
            prompt=[prompt],
            negative_prompt=None if negative is None else [negative],
            height=height,
            width=width,
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(index),
        ).images[0]
        expected = np.asarray(picture).astype(int)
        assert expected.std() > 10, "a flat picture would prove nothing"
        assert np.abs(got[index] - expected).max() <= 2, CASES[index]


def test_a_prompt_cut_at_the_reference_limit_says_so(omni: Omni, reference: ZImagePipeline) -> None:
    """The pipeline keeps 512 tokens, template included."""
    prompt = "world end " * 600
    params = DiffusionParams(height=32, width=32, guidance_scale=0.0, num_inference_steps=2, seed=1)
    output = omni.generate(prompt, params)[0]
    settings = dict(height=32, width=32, guidance_scale=0.0, num_inference_steps=2)
    expected = reference(prompt=[prompt], generator=torch.Generator().manual_seed(1), **settings).images[0]
    assert np.abs(pixels(output) - np.asarray(expected).astype(int)).max() <= 2
    assert output.metrics["text"]["truncated_tokens"] > 0
    again, longer = (omni.generate(words, params)[0].metrics["text"] for words in (prompt, f"{prompt} and on"))
    assert again["cached"] and again["truncated_tokens"] == output.metrics["text"]["truncated_tokens"]
    assert longer["truncated_tokens"] > again["truncated_tokens"], "each request is told of its own prompt"


def test_alone_in_a_crowd_in_another_order_and_on_replay(omni: Omni) -> None:
    indices = list(range(len(CASES)))
    alone = {index: drawn(omni, [index])[index] for index in indices}
    for order in (indices, indices[::-1], [3, 1, 5, 0, 2, 4]):
        for index, picture in drawn(omni, order).items():
            assert np.abs(picture - alone[index]).max() <= 1, (order, index)


def test_another_process_draws_the_same_picture(omni: Omni, folder: Path, tmp_path: Path) -> None:
    here = drawn(omni, [0])[0]
    command = [sys.executable, "-m", "vllm_omni", "generate", CASES[0][0], "--model", str(folder), "-o", "x.png"]
    options = ["--seed", "0", "--steps", "4", "--guidance", "0", "--height", "64", "--width", "64"]
    subprocess.run([*command, *options], check=True, cwd=tmp_path, capture_output=True, timeout=120)
    assert np.abs(np.asarray(Image.open(tmp_path / "x.png")).astype(int) - here).max() <= 1


def test_a_repeated_prompt_with_a_new_seed_skips_the_text_stage(omni: Omni) -> None:
    params = [DiffusionParams(height=32, width=32, guidance_scale=0.0, num_inference_steps=2, seed=s) for s in (1, 2)]
    first = omni.generate("a prompt of its own", params[0])[0]
    second = omni.generate("a prompt of its own", params[1])[0]
    assert not first.metrics["text"].get("cached") and second.metrics["text"]["cached"]
    assert second.metrics["text"]["steps"] == 0
    assert not np.array_equal(pixels(first), pixels(second))


def test_neutral_guidance_never_runs_the_negative_stage(omni: Omni) -> None:
    base = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1}
    assert "negative" not in omni.generate("x", DiffusionParams(guidance_scale=0.0, **base))[0].metrics  # type: ignore[arg-type]
    guided = omni.generate(
        {"prompt": "x", "negative_prompt": "fresh words"}, DiffusionParams(guidance_scale=2.0, **base)
    )  # type: ignore[arg-type]
    assert guided[0].metrics["negative"]["steps"] > 0


BAD = [
    ({"prompt": "x"}, {"height": 63}, "height"),
    ({"prompt": "x"}, {"height": 100_000, "width": 10_000}, "height"),
    ({"prompt": "x"}, {"num_inference_steps": 10**6}, "num_inference_steps"),
    ({"prompt": "x"}, {"guidance_scale": 1e9}, "guidance_scale"),
    ({"prompt": "x" * 200_000}, {}, "max_prompt_chars"),
    ({"prompt_token_ids": [1, 2, 10**9]}, {}, "token"),
    ({"prompt": "x", "colour": "red"}, {}, "colour"),
    ({"prompt": "x", "priority": "urgent"}, {}, "priority"),
    ({"prompt": "x"}, {"strength": 0.3}, "strength"),
]


def test_bad_requests_name_their_field_and_harm_no_batch_mate(omni: Omni) -> None:
    quiet = drawn(omni, [0])[0]
    prompts = [request(0)[0], *(prompt for prompt, _, _ in BAD), request(0)[0]]
    params = [request(0)[1], *(DiffusionParams(**bad) for _, bad, _ in BAD), request(0)[1]]  # type: ignore[arg-type]
    outputs = omni.generate(prompts, params)
    for (_, _, field), output in zip(BAD, outputs[1:-1], strict=True):
        assert output.error is not None and field in str(output.error), (field, output.error)
        assert not output.images
    for output in (outputs[0], outputs[-1]):
        assert np.abs(pixels(output) - quiet).max() <= 1


def test_two_stages_share_one_copy_of_the_text_model(omni: Omni) -> None:
    assert omni.get_metrics()["num_models"] == 2, "text encoder and image model"
