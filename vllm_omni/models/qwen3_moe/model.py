"""Qwen3 with sparse experts (arXiv 2505.09388) over a paged KV cache. Loads `Qwen3MoeForCausalLM` folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.layers.causal_lm import CausalLM, CausalLMConfig
from vllm_omni.layers.experts import ExpertsConfig
from vllm_omni.layers.layer_windows import read_windows


@dataclass(frozen=True, slots=True)
class Qwen3MoeConfig(CausalLMConfig):
    """As of a Qwen3, but for the MLPs of some layers."""

    experts: ExpertsConfig

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen3MoeConfig:
        """From a config.json of any age; ConfigError with the key for what is missing, wrong or not supported."""
        has_bias = bool(raw.get("attention_bias", False))
        fields = cls.fields_from(raw, where, head_dim=None, own_keys=("use_sliding_window",))
        is_windowed = bool(raw.get("use_sliding_window"))
        return cls(
            **fields,
            **cls.head_fields(raw),
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=True,
            windows=read_windows({**raw, "layer_types": None}, where, is_used=is_windowed),
            experts=ExpertsConfig.from_json(raw, where, fields["num_layers"]),
        )


class Qwen3Moe(CausalLM):
    """The model of one folder."""

    is_capturable = False  # which experts have tokens is asked of the device
    config: Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config, lambda index: config.experts.make_mlp(config, index))

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen3MoeConfig:
        return Qwen3MoeConfig.from_json(raw, where)
