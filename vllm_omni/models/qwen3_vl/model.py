"""The language model of Qwen3-VL (arXiv 2511.21631), dense, for text alone, over a paged KV cache. Loads
`Qwen3VLForConditionalGeneration` folders without their encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.layers.causal_lm import CausalLMConfig, TextPart

DEFAULTS = {"head_dim": 128, "max_position_embeddings": 128000}  # transformers', where a file leaves them out
ROPE: Mapping[str, Any] = {"rope_theta": 500000.0}


@dataclass(frozen=True, slots=True)
class Qwen3VLTextConfig(CausalLMConfig):
    """As of a Qwen3."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen3VLTextConfig:
        """From the config.json of a whole checkpoint; ConfigError with the key for what is missing, wrong or not
        supported.
        """
        text, inside = TextPart.text_config(raw, where)
        text = {**DEFAULTS, **text}
        has_bias = bool(text.get("attention_bias", False))
        return cls(
            **cls.fields_from(text, inside, head_dim=None, rope=ROPE),
            **cls.head_fields(text),
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=True,
        )


class Qwen3VLText(TextPart):
    """The language model of one folder."""

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen3VLTextConfig:
        return Qwen3VLTextConfig.from_json(raw, where)
