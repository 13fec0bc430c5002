"""Qwen2 and Qwen2.5, dense (arXiv 2407.10671), over a paged KV cache. Loads `Qwen2ForCausalLM` folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.layers.causal_lm import CausalLM, CausalLMConfig
from vllm_omni.layers.layer_windows import WINDOW_KEYS, read_qwen_windows


@dataclass(frozen=True, slots=True)
class Qwen2Config(CausalLMConfig):
    """No norms on heads; biases on queries, keys and values, whatever the file says."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen2Config:
        """From a config.json of any age; ConfigError with the key for what is missing, wrong or not supported."""
        return cls(
            **cls.fields_from(raw, where, head_dim=None, own_keys=WINDOW_KEYS),
            **cls.head_fields(raw),
            qkv_bias=True,
            output_bias=False,
            head_norms=False,
            windows=read_qwen_windows(raw, where),
        )


class Qwen2(CausalLM):
    """The model of one folder."""

    can_shard = True

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen2Config:
        return Qwen2Config.from_json(raw, where)
