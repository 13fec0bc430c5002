"""The language model of Qwen2.5-VL (arXiv 2502.13923) and Qwen2-VL (arXiv 2409.12191), for text alone, over a paged KV
cache. Loads `Qwen2_5_VLForConditionalGeneration` and `Qwen2VLForConditionalGeneration` folders without their encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.layers.causal_lm import CausalLMConfig, TextPart
from vllm_omni.layers.layer_windows import WINDOW_KEYS, read_qwen_windows

EPSILON = 1e-5  # transformers' default
ROPE: Mapping[str, Any] = {"rope_theta": 1000000.0}
MAX_WINDOW_LAYERS = 80


@dataclass(frozen=True, slots=True)
class Qwen2_5_VLTextConfig(CausalLMConfig):
    """As of a Qwen2."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen2_5_VLTextConfig:
        """From the config.json of a whole checkpoint of any age; ConfigError with the key for what is missing, wrong or
        not supported.
        """
        text, inside = TextPart.text_config(raw, where)
        text = {"rms_norm_eps": EPSILON, **text}
        return cls(
            **cls.fields_from(text, inside, head_dim=None, rope=ROPE, own_keys=WINDOW_KEYS),
            **cls.head_fields(text),
            qkv_bias=True,
            output_bias=False,
            head_norms=False,
            windows=read_qwen_windows(text, inside, MAX_WINDOW_LAYERS),
        )


class Qwen2_5_VLText(TextPart):
    """The language model of one folder."""

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen2_5_VLTextConfig:
        return Qwen2_5_VLTextConfig.from_json(raw, where)
