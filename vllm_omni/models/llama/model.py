"""Llama (arXiv 2307.09288, 2407.21783) over a paged KV cache. Loads `LlamaForCausalLM` folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.layers.causal_lm import CausalLM, CausalLMConfig

MAX_POSITIONS = 2048  # transformers' default


@dataclass(frozen=True, slots=True)
class LlamaConfig(CausalLMConfig):
    """No norms on heads; biases in attention and MLP where the file says so."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> LlamaConfig:
        """From a config.json of any age; ConfigError with the key for what is missing, wrong or not supported."""
        raw = {"max_position_embeddings": MAX_POSITIONS, **raw}
        has_bias = bool(raw.get("attention_bias", False))
        return cls(
            **cls.fields_from(raw, where, head_dim=None, own_keys=("mlp_bias",)),
            **cls.head_fields(raw),
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=False,
            mlp_bias=bool(raw.get("mlp_bias", False)),
        )


class Llama(CausalLM):
    """The model of one folder."""

    can_shard = True

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> LlamaConfig:
        return LlamaConfig.from_json(raw, where)
