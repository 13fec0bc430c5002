"""Weights published in bfloat16 stay so beside `dtype: float32` on a CPU: the same bits, half of the memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ar import make_model_folder
from support.diffusers_folders import random_z_image

from vllm_omni import DiffusionParams, Omni, SamplingParams
from vllm_omni.entrypoints.cli import main
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.errors import ConfigError
from vllm_omni.executor.memory import plan_memory
from vllm_omni.layers.halves import is_fast
from vllm_omni.layers.native import library

PROMPTS = [[1, 60, 70, 80, 90, 100, 71], [1, 5], [1, 81, 91, 60, 70, 80, 5, 6, 7, 9, 12]]
WRITTEN = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
PICTURE = DiffusionParams(height=64, width=64, num_inference_steps=4, guidance_scale=0.0, seed=3)
HELD = "float32 with bfloat16 weights"
with_kernels = pytest.mark.skipif(not is_fast(), reason="needs compiled kernels")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("words") / "model", tie_word_embeddings=request.param)
    return stored(folder, torch.bfloat16)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random_z_image(folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


def stored(folder: Path, dtype: torch.dtype, only: str = "") -> Path:
    """All tensors whose names hold a word are stored so."""
    file = folder / "model.safetensors"
    save_file({name: t.to(dtype) if only in name else t for name, t in load_file(file).items()}, file)
    return folder


def opened(folder: Path, *overrides: str) -> Omni:
    return Omni(model=str(folder), overrides=["device=cpu", "dtype=float32", *overrides], progress=False)


def dtype_of(omni: Omni, stage: str) -> str:
    dtype: str = omni.get_metrics()["dtypes"][stage]["dtype"]
    return dtype


@with_kernels
def test_texts_and_their_likelihoods_are_those_of_weights_in_float32(words: Path) -> None:
    found = {}
    for quantization in ("auto", "none"):
        with opened(words, f"text.quantization={quantization}") as omni:
            found[dtype_of(omni, "text")] = [
                (list(output.token_ids or ()), output.logprobs) for output in omni.generate(PROMPTS, WRITTEN)
            ]
    assert set(found) == {HELD, "float32"}
    assert found[HELD] == found["float32"]


@with_kernels
def test_a_picture_is_that_of_weights_in_float32(pictures: Path) -> None:
    drawn = {}
    for quantization in ("auto", "none"):
        with opened(pictures, f"image.quantization={quantization}") as omni:
            drawn[dtype_of(omni, "image")] = np.asarray(omni.generate("a red circle", PICTURE)[0].images[0])
    assert set(drawn) == {HELD, "float32"}
    assert drawn[HELD].std() > 10, "a flat picture would prove nothing"
    assert np.array_equal(drawn[HELD], drawn["float32"])


def test_without_kernels_it_is_done_where_it_is_asked_for(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "built_variants", dict)
    texts = []
    for quantization, dtype in (("auto", "float32"), ("bfloat16", HELD)):
        with opened(words, f"text.quantization={quantization}") as omni:
            assert dtype_of(omni, "text") == dtype
            texts.append([output.token_ids for output in omni.generate(PROMPTS, WRITTEN)])
    assert texts[0] == texts[1]


@with_kernels
def test_check_says_so_and_plans_half(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(words), "--set", "device=cpu", "--set", "dtype=float32"]
    assert main(["check", *model]) == 0
    assert HELD in capsys.readouterr().out
    sizes = []
    for quantization in ("auto", "none"):
        overrides = ["device=cpu", "dtype=float32", f"text.quantization={quantization}"]
        sizes.append(plan_memory(open_pipeline(model=str(words), overrides=overrides))["text"].weights_bytes)
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(("dtype", "only"), [(torch.float16, ""), (torch.float32, "layers.0.mlp.down_proj")])
def test_what_would_have_to_be_rounded_is_not(words: Path, tmp_path: Path, dtype: torch.dtype, only: str) -> None:
    folder = stored(shutil.copytree(words, tmp_path / "model"), dtype, only)
    with opened(folder) as omni:
        assert dtype_of(omni, "text") == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_beside_other_dtypes_it_is_refused(words: Path, dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"got 'bfloat16' on cpu, expected none: .*not for {dtype} on cpu; remove"):
        opened(words, f"dtype={dtype}", "text.quantization=bfloat16")
