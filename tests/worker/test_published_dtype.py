"""What a checkpoint was published in: its config.json, else what most of its numbers are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_omni.errors import CheckpointError
from vllm_omni.worker.published_dtype import dtype_of_config, dtype_of_folders, dtype_of_headers

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CONFIGS: dict[str, tuple[dict[str, Any], str | None, torch.dtype | None]] = {
    "as transformers writes it": ({"dtype": "bfloat16"}, None, BF16),
    "as it used to": ({"torch_dtype": "float16"}, None, F16),
    "with the module": ({"torch_dtype": "torch.float32"}, None, F32),
    "wide": ({"dtype": "float64"}, None, F64),
    "of the language model": ({"text_config": {"dtype": "bfloat16"}}, None, BF16),
    "of the part": ({"thinker_config": {"dtype": "bfloat16"}}, "thinker", BF16),
    "of the part's language model": ({"thinker_config": {"text_config": {"torch_dtype": "float16"}}}, "thinker", F16),
    "of another part": ({"talker_config": {"dtype": "bfloat16"}}, "thinker", None),
    "the whole before the part": ({"dtype": "bfloat16", "talker_config": {"dtype": "float32"}}, "talker", BF16),
    "of no language model": ({"vision_config": {"dtype": "float32"}}, None, None),
    "nothing": ({}, None, None),
    "null": ({"dtype": None, "torch_dtype": None}, None, None),
    "null before another": ({"dtype": None, "torch_dtype": "bfloat16"}, None, BF16),
    "what a library decides": ({"dtype": "auto"}, None, None),
    "quantised": ({"dtype": "float8_e4m3fn"}, None, None),
    "no name": ({"dtype": ["bfloat16"], "text_config": "bfloat16", "thinker_config": 5}, "thinker", None),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_says_it(case: str) -> None:
    raw, part, expected = CONFIGS[case]
    assert dtype_of_config(raw, part) == expected


def stored(file: Path, **tensors: tuple[int, torch.dtype]) -> Path:
    """name=(how many numbers, of which dtype)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(count, dtype=dtype) for name, (count, dtype) in tensors.items()}, file)
    return file


def test_most_numbers_decide_not_most_tensors(tmp_path: Path) -> None:
    norms = {f"norm{index}": (2, F32) for index in range(20)}
    assert dtype_of_headers([stored(tmp_path / "a.safetensors", table=(41, BF16), **norms)]) == BF16
    assert dtype_of_headers([stored(tmp_path / "b.safetensors", table=(39, BF16), **norms)]) == F32


def test_of_equally_many_the_wider_one_is_kept(tmp_path: Path) -> None:
    assert dtype_of_headers([stored(tmp_path / "a.safetensors", a=(4, BF16), b=(4, F32), c=(4, F16))]) == F32


def test_files_add_up_and_each_counts_once(tmp_path: Path) -> None:
    half = stored(tmp_path / "a.safetensors", a=(6, F16))
    whole = [stored(tmp_path / f"{name}.safetensors", a=(4, F32)) for name in "bc"]
    assert dtype_of_headers([half, *whole]) == F32
    assert dtype_of_headers([half, half, whole[0]]) == dtype_of_headers([half, whole[0]]) == F16


def test_integers_say_nothing(tmp_path: Path) -> None:
    assert dtype_of_headers([stored(tmp_path / "a.safetensors", steps=(100, torch.int64), a=(1, BF16))]) == BF16
    assert dtype_of_headers([stored(tmp_path / "b.safetensors", steps=(100, torch.int64))]) is None
    assert dtype_of_headers([]) is None


def test_only_the_tensors_that_are_read_count(tmp_path: Path) -> None:
    tensors = {"talker.a": (9, F32), "thinker.a": (3, BF16), "thinker.visual.a": (5, F32)}
    file = stored(tmp_path / "model.safetensors", **tensors)
    assert dtype_of_headers([file]) == F32
    assert dtype_of_headers([file], "thinker.") == F32
    assert dtype_of_headers([file], "thinker.", ("thinker.visual.",)) == BF16


def test_folders_add_up_though_their_tensors_have_one_name(tmp_path: Path) -> None:
    stored(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", weight=(9, BF16))
    stored(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", weight=(5, F32))
    assert dtype_of_folders([tmp_path / "vae"]) == F32
    assert dtype_of_folders([tmp_path / "transformer", tmp_path / "vae"]) == BF16


def test_a_damaged_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        dtype_of_headers([file])
