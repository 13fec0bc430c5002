"""Qwen3 with sparse experts (arXiv 2505.09388) over a paged KV cache. Loads `Qwen3MoeForCausalLM` folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.causal_lm import CausalLM, CausalLMConfig
from vllm_omni.layers.decoder import DecoderMLP, count_of
from vllm_omni.layers.layer_windows import read_windows
from vllm_omni.layers.moe import SparseMLP
from vllm_omni.utils.checks import brief, check_number

EXPERT_DEFAULTS = {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}  # transformers'
MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class Qwen3MoeConfig(CausalLMConfig):
    """As of a Qwen3, but for the MLPs of some layers."""

    num_experts: int
    num_chosen: int  # experts of each token
    expert_size: int  # the intermediate size of an expert
    normalises: bool  # whether the weights of the chosen experts sum to one
    sparse_layers: frozenset[int]  # the others have one MLP

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen3MoeConfig:
        """From a config.json of any age; ConfigError with the key for what is missing, wrong or not supported."""
        has_bias = bool(raw.get("attention_bias", False))
        sizes = {**EXPERT_DEFAULTS, "num_experts": raw.get("num_local_experts"), **raw}
        num_experts = count_of(sizes, "num_experts", where)
        num_chosen = count_of(sizes, "num_experts_per_tok", where)
        check_number(f"{where}: num_experts", num_experts, 1, MAX_EXPERTS, integer=True, raises=ConfigError)
        check_number(f"{where}: num_experts_per_tok", num_chosen, 1, num_experts, integer=True, raises=ConfigError)
        fields = cls.fields_from(raw, where, head_dim=None, own_keys=("use_sliding_window",))
        is_windowed = bool(raw.get("use_sliding_window"))
        return cls(
            **fields,
            **cls.head_fields(raw),
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=True,
            windows=read_windows({**raw, "layer_types": None}, where, is_used=is_windowed),
            num_experts=num_experts,
            num_chosen=num_chosen,
            expert_size=count_of(sizes, "moe_intermediate_size", where),
            normalises=bool(raw.get("norm_topk_prob", False)),
            sparse_layers=_sparse_layers(sizes, where, fields["num_layers"]),
        )


class Qwen3Moe(CausalLM):
    """The model of one folder."""

    is_capturable = False  # which experts have tokens is asked of the device
    config: Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config, lambda index: _make_mlp(config, index))

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen3MoeConfig:
        return Qwen3MoeConfig.from_json(raw, where)


def _make_mlp(config: Qwen3MoeConfig, index: int) -> nn.Module:
    if index not in config.sparse_layers:
        return DecoderMLP(config)
    return SparseMLP(
        config.hidden_size,
        lambda: DecoderMLP(config, config.expert_size),
        num_experts=config.num_experts,
        num_chosen=config.num_chosen,
        normalises=config.normalises,
    )


def _sparse_layers(raw: Mapping[str, Any], where: str, num_layers: int) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""
    step = count_of(raw, "decoder_sparse_step", where)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(x, bool) or not isinstance(x, int) for x in dense):
        raise ConfigError(f"{where}: mlp_only_layers: got {brief(dense)}, expected a list of layer indices")
    return frozenset(index for index in range(num_layers) if (index + 1) % step == 0) - set(dense)
