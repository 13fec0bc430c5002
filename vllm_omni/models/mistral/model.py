"""Mistral (arXiv 2310.06825) and Ministral over a paged KV cache. Loads `MistralForCausalLM` and `MinistralForCausalLM`
folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.layers.causal_lm import CausalLM, CausalLMConfig
from vllm_omni.layers.layer_windows import WINDOW_KEYS, read_windows

DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8}  # transformers', where a file leaves them out


@dataclass(frozen=True, slots=True)
class MistralConfig(CausalLMConfig):
    """No norms on heads and no biases; every layer sees a window, unless the file sets none."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str, has_pattern: bool) -> MistralConfig:
        """From a config.json of any age; ConfigError with the key for what is missing, wrong or not supported.
        has_pattern: whether `layer_types` says which layers see a window; else all do, as in transformers.
        """
        raw = {**DEFAULTS, **raw}
        windowed = raw if has_pattern else {**raw, "layer_types": None}
        return cls(
            **cls.fields_from(raw, where, head_dim=None, own_keys=WINDOW_KEYS),
            **cls.head_fields(raw),
            qkv_bias=False,
            output_bias=False,
            head_norms=False,
            windows=read_windows(windowed, where),
        )


class Mistral(CausalLM):
    """The model of one folder."""

    can_shard = True

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> MistralConfig:
        return MistralConfig.from_json(raw, where, has_pattern=False)


class Ministral(CausalLM):
    """A Mistral with a pattern of layers."""

    can_shard = True

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> MistralConfig:
        return MistralConfig.from_json(raw, where, has_pattern=True)
