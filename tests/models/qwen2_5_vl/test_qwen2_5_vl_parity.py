"""The language models of Qwen2.5-VL and Qwen2-VL against transformers' whole models, for text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import edit_json
from support.language_models import TINY, assert_equals_transformers, read_config, save_random_model
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from vllm_omni.engine.ar.tokenizer import end_of_sequence_ids
from vllm_omni.errors import ConfigError
from vllm_omni.worker.ar.language_model import LanguageModelFolder

ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "2.5": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {**VISION, "intermediate_size": 32}),
    "2": (
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
    ),
}


def make_folder(folder: Path, family: str = "2.5", tied: bool = False, **changes: Any) -> Path:
    build, kind, vision = FAMILIES[family]
    text = {**TINY, "rope_parameters": ROPE, **changes}
    return save_random_model(build, kind(text_config=text, vision_config=vision, tie_word_embeddings=tied), folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True},
        {"num_key_value_heads": 1},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ],
)
def test_greedy_tokens_logits_and_states_equal_transformers(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", family, **changes)
    assert_equals_transformers(FAMILIES[family][0], folder)


def test_the_flat_files_of_early_checkpoints_mean_the_same(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    new = read_config(folder)
    raw = json.loads((folder / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    old_rope = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    raw |= {**{key: value for key, value in text.items() if key != "model_type"}, **old_rope}
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_config(folder) == new
    assert_equals_transformers(Qwen2_5_VLForConditionalGeneration, folder)


def test_the_encoder_is_neither_loaded_nor_counted(tmp_path: Path) -> None:
    model = LanguageModelFolder.open(make_folder(tmp_path / "model"))
    loaded: Any = model.load(torch.device("cpu"), torch.float32)
    names = [name for name, _ in loaded.named_parameters()]
    assert not any("visual" in name for name in names)
    vocabulary, width, inner, layers = 320, 32, 64, 3
    attention = 2 * width * width + 2 * width * width // 2 + 2 * width
    numbers = 2 * vocabulary * width + width + layers * (attention + 3 * width * inner + 2 * width)
    assert model.weights_bytes(4) == 4 * numbers


def test_the_ending_token_is_found_with_the_text(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", eos_token_id=7)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert end_of_sequence_ids(folder, None) == {7}


def test_what_is_wrong_is_named_with_its_place(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config={**raw["text_config"], "hidden_size": 0})
    with pytest.raises(ConfigError, match="text_config: hidden_size: got 0"):
        read_config(folder)
    edit_json(folder / "config.json", text_config=["a"])
    with pytest.raises(ConfigError, match="text_config: got list, expected an object"):
        read_config(folder)
