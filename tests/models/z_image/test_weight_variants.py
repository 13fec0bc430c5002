"""The key `variant`: which of a folder's weight files (fp16, bf16, plain) are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.diffusers_folders import random_z_image

from vllm_omni import DiffusionParams, Omni
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.errors import ConfigError
from vllm_omni.layers.weights import tensor_shapes


def made(folder: Path) -> Path:
    random_z_image(folder)
    return folder


def test_weights_that_are_there_in_a_variant_alone_are_loaded(tmp_path: Path) -> None:
    plain = made(tmp_path / "plain")
    half = tmp_path / "half"
    shutil.copytree(plain, half)
    for part in ("transformer", "vae", "text_encoder"):
        for file in (half / part).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    small = DiffusionParams(height=32, width=32, seed=1)
    pictures = []
    for folder in (plain, half):
        with Omni(model=str(folder), progress=False) as omni:
            (output,) = omni.generate("a circle", small)
            assert output.error is None, output.error
            pictures.append(np.asarray(output.images[0]))
    assert np.array_equal(*pictures)


def test_a_variant_that_is_named_is_loaded_and_one_that_no_part_has_is_refused(tmp_path: Path) -> None:
    folder, half, mixed = made(tmp_path / "plain"), tmp_path / "half", tmp_path / "mixed"
    for copy in (half, mixed):
        shutil.copytree(folder, copy)
    for file in half.glob("*/*.safetensors"):
        rounded = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
        save_file(rounded, file)
        save_file(rounded, mixed / file.parent.name / file.name.replace(".safetensors", ".fp16.safetensors"))
    (mixed / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()  # a part that has plain ones alone
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", half / "vae")
    named = ["text.variant=fp16", "image.variant=fp16", "negative.variant=fp16"]

    def picture(model: Path, *overrides: str) -> Any:
        with Omni(model=str(model), overrides=["dtype=float32", *overrides], progress=False) as omni:
            (output,) = omni.generate("a circle", DiffusionParams(height=32, width=32, seed=1))
            assert output.error is None, output.error
            return np.asarray(output.images[0]), output.metrics

    rounded, named_files, plain = picture(half), picture(mixed, *named), picture(mixed)
    assert np.array_equal(rounded[0], named_files[0])
    assert not np.array_equal(plain[0], named_files[0])
    for stage in ("text", "image"):
        with pytest.raises(ConfigError, match=rf"stages.{stage}.variant: got 'bf16', but .* has fp16"):
            open_pipeline(model=str(mixed), overrides=[f"{stage}.variant=bf16"])


def test_dtype_and_memory_go_by_the_files_of_the_variant(tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    for file in folder.glob("*/*.safetensors"):
        half = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
        save_file(half, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    plain = open_pipeline(model=str(folder)).specs
    named = open_pipeline(model=str(folder), overrides=["text.variant=fp16", "image.variant=fp16"]).specs
    for stage in ("text", "image"):
        assert (plain[stage].published_dtype(), named[stage].published_dtype()) == (torch.float32, torch.float16)
        assert plain[stage].weights_key() != named[stage].weights_key()


def test_shards_of_a_variant_are_read_by_their_own_index(tmp_path: Path) -> None:
    first, second, plain = {"a": torch.ones(2)}, {"b": torch.zeros(3)}, {"a": torch.ones(4), "b": torch.ones(5)}
    save_file(plain, tmp_path / "model.safetensors")
    weight_map = {}
    for number, tensors in enumerate((first, second), 1):
        name = f"model.fp16-0000{number}-of-00002.safetensors"
        save_file(tensors, tmp_path / name)
        weight_map |= dict.fromkeys(tensors, name)
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    assert tensor_shapes(tmp_path, variant="fp16") == {"a": (2,), "b": (3,)}
    assert tensor_shapes(tmp_path) == tensor_shapes(tmp_path, variant="bf16") == {"a": (4,), "b": (5,)}
    (tmp_path / "model.safetensors.index.fp16.json").unlink()
    assert tensor_shapes(tmp_path, variant="fp16") == {"a": (2,), "b": (3,)}
