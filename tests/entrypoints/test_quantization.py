"""`quantization: int8` from the key to what comes out: planned for, said, loaded from plain and quantised checkpoints,
and refused where it cannot be.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ar import edit_json, make_model_folder
from support.diffusers_folders import random_z_image
from support.speech import save_tiny_omni

from vllm_omni import DiffusionParams, Omni, SamplingParams
from vllm_omni.entrypoints.cli import main
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.executor.memory import plan_memory
from vllm_omni.layers.native import library
from vllm_omni.layers.quantization import quantize_weight
from vllm_omni.worker.ar.language_model import LanguageModelFolder

PROMPTS = [[1, 60, 70, 80, 90, 100, 71], [1, 5], [1, 81, 91, 60, 70, 80, 5, 6, 7, 9, 12]]
PICTURE = DiffusionParams(height=64, width=64, num_inference_steps=4, guidance_scale=0.0, seed=3)
WORDS = "a red circle left of a blue square"
CPU = torch.device("cpu")
INT8_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
}


def scheme(**changes: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors; changes: of its only group's weights."""
    group = {**INT8_GROUP, "weights": {**INT8_GROUP["weights"], **changes}}  # type: ignore[dict-item]
    named = {"config_groups": {"group_0": group}, "format": "int-quantized", "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "kv_cache_scheme": None, **named}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 in float32."""
    return make_model_folder(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random_z_image(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def published(words: Path, tmp_path: Path) -> Path:
    """The same in int8, as compressed-tensors publishes it; embeddings and head stay."""
    return quantised_folder(words, tmp_path / "int8", scheme(), *quantised_to(torch.int8))


def quantised_to(dtype: torch.dtype) -> tuple[torch.dtype, float]:
    return dtype, 127.0 if dtype == torch.int8 else 448.0


def quantised_folder(
    words: Path, folder: Path, quantization: Mapping[str, Any], dtype: torch.dtype, largest: float
) -> Path:
    shutil.copytree(words, folder)
    edit_json(folder / "config.json", quantization_config=quantization)
    tensors = {}
    for name, tensor in load_file(words / "model.safetensors").items():
        if "_proj.weight" not in name:
            tensors[name] = tensor
        elif dtype == torch.int8:
            tensors[name], scales = quantize_weight(tensor)
            tensors[f"{name}_scale"] = scales[:, None].contiguous()
        else:
            scale = tensor.abs().max() / largest
            tensors[name], tensors[f"{name}_scale"] = (tensor / scale).to(dtype), scale[None]
    save_file(tensors, folder / "model.safetensors")
    return folder


def opened(folder: Path, *overrides: str) -> Omni:
    return Omni(model=str(folder), overrides=["device=cpu", *overrides], progress=False)


def written(omni: Omni, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    found = []
    for output in omni.generate(prompts, params):
        assert output.error is None and output.token_ids is not None and output.logprobs is not None, output.error
        chosen = [given[token] for given, token in zip(output.logprobs, output.token_ids, strict=True)]
        found.append((list(output.token_ids), chosen))
    return found


def dtype_of(omni: Omni, stage: str) -> str:
    dtype: str = omni.get_metrics()["dtypes"][stage]["dtype"]
    return dtype


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_is_the_same_alone_and_in_a_crowd(
    has_kernels: bool, dtype: str, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit with kernels; without them torch rounds what is not in int8 by how many rows there are."""
    if not has_kernels:
        monkeypatch.setattr(library, "built_variants", dict)
    with opened(words, f"dtype={dtype}", "text.quantization=int8") as omni:
        assert dtype_of(omni, "text") == f"{dtype} with int8 weights"
        together = written(omni, PROMPTS)
    with opened(words, f"dtype={dtype}", "text.quantization=int8", "text.prefix_caching=false") as omni:
        alone = [written(omni, [prompt])[0] for prompt in PROMPTS]
    if has_kernels and library.built_variants():
        assert alone == together
    else:
        assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in together]


def test_a_picture_is_nearly_that_of_the_weights_as_published(pictures: Path) -> None:
    shown = []
    for quantization in ("none", "int8"):
        with opened(pictures, "dtype=float32", f"image.quantization={quantization}") as omni:
            output = omni.generate(WORDS, PICTURE)[0]
            assert output.error is None
            shown.append(np.asarray(output.images[0]).astype(float))
    error = np.square(shown[1] - shown[0]).mean()
    assert shown[0].std() > 10, "a flat picture would prove nothing"
    assert 0 < error < 255**2 * 10**-2.5, "of less than 25 dB"


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_plan_counts_what_is_loaded(quantization: str | None, words: Path) -> None:
    folder = LanguageModelFolder.open(words)
    model: Any = folder.load(CPU, torch.bfloat16, quantization)
    buffers = [layer.scales for layer in model.modules() if getattr(layer, "scales", None) is not None]
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *buffers])
    assert folder.weights_bytes(2, quantization) == held


def test_check_names_it_and_plans_with_it(words: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, stage in ((words, "text"), (pictures, "image")):
        assert (
            main(["check", "--model", str(folder), "--set", "dtype=bfloat16", "--set", f"{stage}.quantization=int8"])
            == 0
        )
        assert "bfloat16 with int8 weights" in capsys.readouterr().out
        sizes = []
        for quantization in ("none", "int8"):
            overrides = ["dtype=bfloat16", f"{stage}.quantization={quantization}"]
            pipeline = open_pipeline(model=str(folder), overrides=overrides)
            sizes.append(plan_memory(pipeline)[stage].weights_bytes)
        assert sizes[1] < sizes[0]


def test_a_checkpoint_in_int8_is_what_the_plain_one_becomes(words: Path, published: Path) -> None:
    with opened(words, "text.quantization=int8") as omni:
        expected = written(omni, PROMPTS)
    with opened(published) as omni:
        assert dtype_of(omni, "text") == "float32 with int8 weights"
        assert written(omni, PROMPTS) == expected


def test_a_checkpoint_in_int8_is_read_as_numbers_where_none_is_asked(published: Path) -> None:
    with opened(published, "text.quantization=none") as omni:
        assert dtype_of(omni, "text") == "float32"
        plain = written(omni, PROMPTS)
    with opened(published) as omni:
        quantised = written(omni, PROMPTS)
    assert plain[0][1][0] == pytest.approx(quantised[0][1][0], abs=0.1)


def test_a_checkpoint_in_float8_is_read_as_numbers(words: Path, tmp_path: Path) -> None:
    quantization = {**scheme(type="float", strategy="tensor"), "format": "float-quantized"}
    folder = quantised_folder(words, tmp_path / "float8", quantization, *quantised_to(torch.float8_e4m3fn))
    with opened(words) as omni:
        expected = written(omni, PROMPTS)
    with opened(folder) as omni:
        assert dtype_of(omni, "text") == "float32"
        assert written(omni, PROMPTS)[0][1][0] == pytest.approx(expected[0][1][0], abs=0.2)


@pytest.mark.parametrize(
    ("quantization", "key", "got"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method", "gptq"),
        (scheme(num_bits=4), "weights.num_bits", "4"),
        (scheme(strategy="group"), "weights.strategy", "group"),
        (scheme(symmetric=False), "weights.symmetric", "False"),
        ({**scheme(), "format": "pack-quantized"}, "format", "pack-quantized"),
        ({**scheme(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme", "num_bits"),
        ({**scheme(), "config_groups": {}}, "config_groups", "{}"),
        ("int8", "quantization_config", "int8"),
    ],
)
def test_other_schemes_are_refused(quantization: Any, key: str, got: str, words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(words, tmp_path / "model")
    edit_json(folder / "config.json", quantization_config=quantization)
    with pytest.raises(ConfigError, match=f"{key}: got .*{got}.*expected"):
        opened(folder)


def test_numbers_without_their_scale_are_refused(published: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight_scale"))
    del tensors[name]
    save_file(tensors, published / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"int8 without .*q_proj.weight_scale"):
        opened(published)


@pytest.mark.parametrize(
    ("quantization", "said"), [("int4", "got 'int4', expected .*int8"), ("true", "quantization: got")]
)
def test_unknown_values_are_refused(quantization: str, said: str, words: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        opened(words, f"text.quantization={quantization}")


def test_stages_that_cannot_refuse_it_before_they_load(pictures: Path, tmp_path: Path) -> None:
    omni = save_tiny_omni(tmp_path / "omni")
    speech = {
        "stages": {"sound": {"kind": "dit", "model": str(omni), "part": "token2wav", "quantization": "int8"}},
        "outputs": ["sound"],
    }
    hosted = {"stages": {"image": {"kind": "diffusers", "model": str(pictures), "quantization": "int8"}}}
    for name, config in (("sound", speech), ("image", {**hosted, "outputs": ["image"]})):
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=rf"stages.{name}.quantization: got 'int8', expected none"):
            open_pipeline(config=str(file))
