"""Qwen3 with sparse experts against transformers: greedy tokens, logits, hidden states, names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import edit_json
from support.language_models import TINY, assert_equals_transformers, load_model, read_config, save_random_model, write
from transformers import Qwen3MoeConfig as PublishedConfig
from transformers import Qwen3MoeForCausalLM

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import plan_loading
from vllm_omni.models.qwen3_moe.model import Qwen3Moe, Qwen3MoeConfig

SPARSE = {**TINY, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "two of six": {},
    "weights that sum to one": {"norm_topk_prob": True},
    "one of six": {"num_experts_per_tok": 1},
    "all of three": {"num_experts": 3, "num_experts_per_tok": 3},
    "every second layer": {"decoder_sparse_step": 2},
    "a dense layer": {"mlp_only_layers": [1]},
    "biased": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "a window": {"use_sliding_window": True, "sliding_window": 7},
    "wide heads": {"head_dim": 16},
}


def make_folder(folder: Path, **changes: Any) -> Path:
    return save_random_model(Qwen3MoeForCausalLM, PublishedConfig(**{**SPARSE, **changes}), folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_logits_and_states_equal_transformers(variant: str, tmp_path: Path) -> None:
    assert_equals_transformers(Qwen3MoeForCausalLM, make_folder(tmp_path / "model", **VARIANTS[variant]))


def test_a_published_file_counts_its_experts_by_another_key(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    edit_json(folder / "config.json", num_local_experts=None, num_experts=6)
    assert_equals_transformers(Qwen3MoeForCausalLM, folder)


def test_a_text_is_the_same_alone_and_in_a_crowd(tmp_path: Path) -> None:
    model = load_model(make_folder(tmp_path / "model"))
    prompts = [[5, 6, 7, 8], [100, 101], [9] * 11, [3, 30, 33, 200, 7]]
    crowd = write(model, prompts, 12)
    for prompt, together in zip(prompts, crowd, strict=True):
        alone = write(model, [prompt], 12)[0]
        assert together.token_ids == alone.token_ids
        torch.testing.assert_close(torch.stack(together.logits), torch.stack(alone.logits), rtol=1e-5, atol=1e-5)


def test_the_published_names_and_shapes_of_qwen3_30b_a3b_load_whole() -> None:
    keys = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 2,  # of 48, which are alike
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    with torch.device("meta"):
        ours = Qwen3Moe(Qwen3MoeConfig.from_json({**keys, "architectures": ["Qwen3MoeForCausalLM"]}, "config.json"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (151936, 2048),
        "lm_head.weight": (151936, 2048),
        "model.norm.weight": (2048,),
    }
    for index in range(2):
        layer = f"model.layers.{index}."
        shapes |= {layer + f"{name}_layernorm.weight": (2048,) for name in ("input", "post_attention")}
        shapes |= {layer + f"self_attn.{name}_norm.weight": (128,) for name in ("q", "k")}
        shapes |= {layer + f"self_attn.{name}_proj.weight": (512, 2048) for name in ("k", "v")}
        shapes |= {layer + "self_attn.q_proj.weight": (4096, 2048), layer + "self_attn.o_proj.weight": (2048, 4096)}
        shapes |= {layer + "mlp.gate.weight": (128, 2048)}
        for expert in range(128):
            shapes |= {f"{layer}mlp.experts.{expert}.{name}_proj.weight": (768, 2048) for name in ("gate", "up")}
            shapes |= {f"{layer}mlp.experts.{expert}.down_proj.weight": (2048, 768)}
    assert set(plan_loading(ours, shapes, "Qwen3-30B-A3B")) == set(shapes)
    with pytest.raises(CheckpointError, match=r"experts\.9\."):
        plan_loading(ours, {k: v for k, v in shapes.items() if "layers.1.mlp.experts.9.up_proj" not in k}, "x")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_local_experts": None}, "num_experts: got None"),
        ({"num_local_experts": 10**9}, "num_experts: got 1000000000, expected at least 1 and at most"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok: got 7, expected at least 1 and at most 6"),
        ({"moe_intermediate_size": "wide"}, "moe_intermediate_size: got 'wide'"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: got 0"),
        ({"mlp_only_layers": ["first"]}, "mlp_only_layers: got"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    ],
)
def test_what_is_not_supported_is_a_config_error_that_names_the_key(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=complaint):
        read_config(folder)
