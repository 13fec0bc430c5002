"""`dtype: auto` from a checkpoint to what it makes: planned for, loaded, said, and as right as transformers and
diffusers are in the same dtype.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from support.ar import edit_json, make_model_folder
from support.diffusers_folders import random_z_image
from support.speech import save_tiny_omni
from transformers import Qwen3ForCausalLM

from vllm_omni import DiffusionParams, Omni, OmniOutput, SamplingParams
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.entrypoints.cli import main
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.executor.memory import plan_memory
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.layers.halves import is_fast

PROMPT = [1, 60, 70, 80, 90, 100, 71, 81, 91, 60, 70, 80, 5, 6, 7]
PICTURE = DiffusionParams(height=64, width=64, num_inference_steps=4, guidance_scale=0.0, seed=3)
WORDS = "a red circle left of a blue square"
# Of a stage that computes in float32 what is stored in bfloat16
FLOAT32 = "float32 with bfloat16 weights" if is_fast() else "float32"


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes this CPU one that multiplies bfloat16, or one that does not."""

    def become(is_capable: bool) -> None:
        monkeypatch.setattr("vllm_omni.utils.precision.multiplies_bfloat16", lambda device: is_capable)

    return become


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 that is published in bfloat16."""
    folder = make_model_folder(tmp_path_factory.mktemp("words") / "model")
    Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Z-Image that is published in bfloat16."""
    folder = tmp_path_factory.mktemp("pictures")
    random_z_image(folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


def opened(folder: Path, *overrides: str) -> Omni:
    return Omni(model=str(folder), overrides=["device=cpu", *overrides], progress=False)


def dtypes(omni: Omni) -> dict[str, str]:
    """By stage, whatever its weights are held in."""
    return {stage: str(chosen["dtype"]).split()[0] for stage, chosen in omni.get_metrics()["dtypes"].items()}


def precisions(pipeline: Pipeline) -> dict[str, str]:
    return {stage: spec.precision.name.split()[0] for stage, spec in pipeline.specs.items()}


def pixels(output: OmniOutput) -> np.ndarray[Any, Any]:
    assert output.error is None, output.error
    return np.asarray(output.images[0]).astype(int)


def drawn_by_diffusers(folder: Path, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": PICTURE.height, "width": PICTURE.width, "num_inference_steps": 4, "guidance_scale": 0.0}
    picture = pipeline(prompt=[WORDS], generator=torch.Generator().manual_seed(3), **size).images[0]
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("is_capable", [True, False])
def test_a_language_model_writes_as_transformers_does_in_its_dtype(
    is_capable: bool, words: Path, cpu: Callable[[bool], None]
) -> None:
    """In bfloat16 the two round differently, so a token may be another of those that are nearly as likely."""
    cpu(is_capable)
    dtype, near = (torch.bfloat16, 0.15) if is_capable else (torch.float32, 1e-4)
    with opened(words) as omni:
        assert dtypes(omni) == {"text": str(dtype).removeprefix("torch.")}
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
        output = omni.generate(PROMPT, params)[0]
    assert output.error is None and output.token_ids is not None and output.logprobs is not None
    model = Qwen3ForCausalLM.from_pretrained(words, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *output.token_ids]])).logits[0, len(PROMPT) - 1 : -1].float()
    theirs = logits.log_softmax(-1)
    for row, token, given in zip(theirs, output.token_ids, output.logprobs, strict=True):
        assert float(row[token]) == pytest.approx(float(row.max()), abs=near)
        assert given[token] == pytest.approx(float(row[token]), abs=near)


@pytest.mark.parametrize("is_capable", [True, False])
def test_a_picture_is_that_of_diffusers_in_its_dtype(
    is_capable: bool, pictures: Path, cpu: Callable[[bool], None]
) -> None:
    cpu(is_capable)
    dtype = torch.bfloat16 if is_capable else torch.float32
    expected = drawn_by_diffusers(pictures, dtype)
    with opened(pictures) as omni:
        assert set(dtypes(omni).values()) == {str(dtype).removeprefix("torch.")}
        error = np.abs(pixels(omni.generate(WORDS, PICTURE)[0]) - expected)
    assert expected.std() > 10, "a flat picture would prove nothing"
    assert error.mean() <= 2 if is_capable else error.max() <= 2


@pytest.mark.parametrize(("text", "image"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_stages_of_two_dtypes_work_together(text: str, image: str, pictures: Path) -> None:
    """What crosses the edge is cast by its reader."""
    prompts = [{"prompt": WORDS, "negative_prompt": "blurry"}]
    guided = DiffusionParams(height=64, width=64, num_inference_steps=4, guidance_scale=2.0, seed=3)
    with opened(pictures, "dtype=float32") as omni:
        exact = pixels(omni.generate(prompts, guided)[0])
    with opened(pictures, f"text.dtype={text}", f"negative.dtype={text}", f"image.dtype={image}") as omni:
        assert dtypes(omni) == {"text": text, "negative": text, "image": image}
        error = np.abs(pixels(omni.generate(prompts, guided)[0]) - exact)
    assert error.max() > 0 and error.mean() <= 4


@pytest.mark.parametrize(
    ("thinker", "talker", "sound", "chosen"),
    [("bfloat16", "float32", "auto", "float32"), ("float32", "bfloat16", "bfloat16", "bfloat16")],
)
def test_stages_of_two_dtypes_speak(thinker: str, talker: str, sound: str, chosen: str, tmp_path: Path) -> None:
    """`auto` is float32 for token2wav, as the reference implementation computes."""
    save_tiny_omni(tmp_path)
    params = {
        "thinker": SamplingParams(temperature=0.0, max_tokens=8),
        "talker": SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
        "token2wav": DiffusionParams(seed=0, num_inference_steps=3),
    }
    overrides = (f"thinker.dtype={thinker}", f"talker.dtype={talker}", f"token2wav.dtype={sound}")
    with opened(tmp_path, *overrides) as omni:
        assert dtypes(omni) == {"thinker": thinker, "talker": talker, "token2wav": chosen}
        output = omni.generate({"prompt_token_ids": [1, 2, 3, 4, 5]}, params)[0]
    assert output.error is None and output.audios[0].duration_s > 0
    assert np.isfinite(output.audios[0].samples).all() and output.audios[0].samples.any()


def test_what_check_plans_with_is_what_is_loaded(pictures: Path, cpu: Callable[[bool], None]) -> None:
    planned, packing = {}, {}
    for is_capable in (True, False):
        cpu(is_capable)
        held = [f"{stage}.quantization=none" for stage in ("text", "negative", "image")]
        pipeline = open_pipeline(model=str(pictures), overrides=["device=cpu", *held])
        plans = plan_memory(pipeline)
        planned[is_capable] = plans
        image = pipeline.specs["image"]
        assert isinstance(image, DiffusionSpec)
        packing[is_capable] = {"text": 0, "image": image.model.packing_bytes(image.precision.dtype)}
        with Omni(pipeline, progress=False) as omni:
            assert omni.get_metrics()["memory"]["planned_bytes"]["image"] == plans["image"].total_bytes
            assert dtypes(omni) == precisions(pipeline)
    for name in ("text", "image"):
        wide, narrow = (planned[capable][name].weights_bytes - packing[capable][name] for capable in (False, True))
        assert wide == 2 * narrow > 0
    assert planned[False]["image"].activation_bytes == 2 * planned[True]["image"].activation_bytes
    assert planned[True]["negative"].weights_bytes == 0, "shared with text"


def test_stages_that_share_weights_share_them_under_auto(pictures: Path, cpu: Callable[[bool], None]) -> None:
    cpu(True)
    with opened(pictures, "negative.dtype=bfloat16") as omni:
        assert omni.get_metrics()["num_models"] == 2, "auto and the dtype that it means are one"
    with opened(pictures, "negative.dtype=float32") as omni:
        assert omni.get_metrics()["num_models"] == 3


def test_each_stage_goes_by_its_own_weights(pictures: Path, tmp_path: Path, cpu: Callable[[bool], None]) -> None:
    """A text encoder of float32 beside a transformer of bfloat16, whose small VAE is of float32."""
    cpu(True)
    mixed = tmp_path / "mixed"
    shutil.copytree(pictures, mixed)
    pipeline = ZImagePipeline.from_pretrained(mixed, dtype=torch.float32)
    pipeline.vae.save_pretrained(mixed / "vae")
    pipeline.text_encoder.save_pretrained(mixed / "text_encoder")
    with opened(mixed) as omni:
        assert dtypes(omni) == {"text": "float32", "negative": "float32", "image": "bfloat16"}
        assert pixels(omni.generate(WORDS, PICTURE)[0]).std() > 10


def test_without_a_word_in_the_config_the_files_say_it(
    words: Path, tmp_path: Path, cpu: Callable[[bool], None]
) -> None:
    cpu(True)
    silent = tmp_path / "silent"
    shutil.copytree(words, silent)
    edit_json(silent / "config.json", dtype=None)
    assert precisions(open_pipeline(model=str(silent), overrides=["device=cpu"])) == {"text": "bfloat16"}
    edit_json(silent / "config.json", dtype="float32")
    assert precisions(open_pipeline(model=str(silent), overrides=["device=cpu"])) == {"text": "float32"}


@pytest.mark.parametrize(("variant", "expected"), [(None, "float32"), ("fp16", "bfloat16")])
def test_a_hosted_pipeline_goes_by_the_files_that_it_loads(
    variant: str | None, expected: str, tmp_path: Path, cpu: Callable[[bool], None]
) -> None:
    cpu(True)
    pipeline = random_z_image(tmp_path)
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    options = [f"result.variant={variant}"] if variant else []
    with Omni("diffusers", model=str(tmp_path), overrides=["device=cpu", *options], progress=False) as omni:
        assert dtypes(omni) == {"result": expected}
        assert pixels(omni.generate(WORDS, PICTURE)[0]).std() > 10


def test_check_says_dtype_and_reason(
    pictures: Path, cpu: Callable[[bool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cpu(True)
    assert main(["check", "--model", str(pictures), "--set", "device=cpu"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "image bfloat16 (published in bfloat16; this CPU multiplies it)" in lines
    cpu(False)
    given = ["--set", "device=cpu", "--set", "text.dtype=bfloat16", "--json"]
    assert main(["check", "--model", str(pictures), *given]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    said = {name: (stage["dtype"], stage["dtype_reason"]) for name, stage in stages.items()}
    assert said["text"] == ("bfloat16", "as configured")
    assert said["image"] == said["negative"] == (FLOAT32, "this CPU does not multiply bfloat16")


def test_loading_and_metrics_say_it_too(
    words: Path, cpu: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    cpu(True)
    with caplog.at_level(logging.INFO, logger="vllm_omni"), opened(words) as omni:
        chosen = omni.get_metrics()["dtypes"]
    assert chosen == {"text": {"dtype": "bfloat16", "reason": "published in bfloat16; this CPU multiplies it"}}
    assert "; dtype bfloat16 (published in bfloat16; this CPU multiplies it)" in caplog.text
