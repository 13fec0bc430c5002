"""Llama against transformers: greedy tokens, logits, hidden states, published names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.language_models import TINY, assert_equals_transformers, read_config, save_random_model
from transformers import LlamaConfig as PublishedConfig
from transformers import LlamaForCausalLM

from vllm_omni.errors import ConfigError
from vllm_omni.layers.weights import plan_loading
from vllm_omni.models.llama.model import Llama, LlamaConfig

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "no groups": {"num_key_value_heads": 4},
    "groups of two": {},
    "one key-value head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "bias in attention": {"attention_bias": True},
    "bias in the MLP": {"mlp_bias": True},
    "one layer": {"num_hidden_layers": 1},
    "other theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "wide epsilon": {"rms_norm_eps": 0.1},
}


def make_folder(folder: Path, **changes: Any) -> Path:
    return save_random_model(LlamaForCausalLM, PublishedConfig(**{**TINY, **changes}), folder)


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of the config.json; None removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_logits_and_states_equal_transformers(variant: str, tmp_path: Path) -> None:
    assert_equals_transformers(LlamaForCausalLM, make_folder(tmp_path / "model", **VARIANTS[variant]))


def test_the_rope_keys_of_published_files_mean_the_same_as_todays(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", rope_parameters=LLAMA3_ROPE)
    new = read_config(folder)
    rope = dict(LLAMA3_ROPE)
    edit_config(folder, rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    assert read_config(folder) == new
    assert_equals_transformers(LlamaForCausalLM, folder)


def test_the_oldest_files_leave_out_what_has_a_default(tmp_path: Path) -> None:
    keys = {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": None, "mlp_bias": None}
    folder = make_folder(tmp_path / "model", num_key_value_heads=4)
    edit_config(folder, **keys, attention_bias=None, rope_parameters=None)
    config = read_config(folder)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 8, 2048)
    assert_equals_transformers(LlamaForCausalLM, folder)


def test_the_published_names_and_shapes_of_llama_3_1_8b_load_whole() -> None:
    keys = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    with torch.device("meta"):
        theirs = LlamaForCausalLM(PublishedConfig(**keys))
        ours = Llama(LlamaConfig.from_json({**keys, "architectures": ["LlamaForCausalLM"]}, "config.json"))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert set(plan_loading(ours, shapes, "Llama-3.1-8B")) == set(shapes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters.factor: got"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
    ],
)
def test_what_is_not_supported_is_a_config_error_that_names_the_key(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=complaint):
        read_config(folder)
