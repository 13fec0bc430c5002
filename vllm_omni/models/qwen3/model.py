"""Qwen3, dense (arXiv 2505.09388), over a paged KV cache. Loads `Qwen3ForCausalLM` and `Qwen3Model` folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.layers.causal_lm import CausalLM, CausalLMConfig
from vllm_omni.layers.layer_windows import WINDOW_KEYS, read_qwen_windows

HEAD_DIM = 128  # transformers' default, whatever hidden size and heads say


@dataclass(frozen=True, slots=True)
class Qwen3Config(CausalLMConfig):
    """Norms on heads; biases in attention where the file says so."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen3Config:
        """From a config.json of any age; ConfigError with the key for what is missing, wrong or not supported."""
        has_bias = bool(raw.get("attention_bias", False))
        return cls(
            **cls.fields_from(raw, where, HEAD_DIM, own_keys=WINDOW_KEYS),
            **cls.head_fields(raw),
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=True,
            windows=read_qwen_windows(raw, where),
        )


class Qwen3(CausalLM):
    """The model of one folder."""

    can_shard = True

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen3Config:
        return Qwen3Config.from_json(raw, where)
