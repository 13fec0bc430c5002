"""Qwen2.5-VL (arXiv 2502.13923): a Qwen2.5 decoder with positions of three axes that reads text, pictures and videos;
and, for text alone, its decoder and that of Qwen2-VL (arXiv 2409.12191). Loads `Qwen2_5_VLForConditionalGeneration` and
`Qwen2VLForConditionalGeneration` folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.layers.causal_lm import CausalLMConfig, TextPart
from vllm_omni.layers.decoder import OMNI_ROPE, sub_config
from vllm_omni.layers.layer_windows import WINDOW_KEYS, read_qwen_windows
from vllm_omni.models.qwen2_5_vl.prompt_reader import Qwen2_5_VLPromptReader
from vllm_omni.worker.ar.vision_language import VisionLanguageModel
from vllm_omni.worker.ar.vision_tower import VisionTower

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
        return cls(**cls.decoder_fields(*TextPart.text_config(raw, where), ROPE))

    @classmethod
    def decoder_fields(cls, text: Mapping[str, Any], inside: str, rope: Mapping[str, Any]) -> dict[str, Any]:
        """text: what stands `inside`; rope: the keys of its positions where it leaves them out."""
        text = {"rms_norm_eps": EPSILON, **text}
        return {
            **cls.fields_from(text, inside, head_dim=None, rope=rope, own_keys=WINDOW_KEYS),
            **cls.head_fields(text),
            "qkv_bias": True,
            "output_bias": False,
            "head_norms": False,
            "windows": read_qwen_windows(text, inside, MAX_WINDOW_LAYERS),
        }


@dataclass(frozen=True, slots=True)
class Qwen2_5_VLConfig(Qwen2_5_VLTextConfig):
    """The decoder, and what its vision tower is built from."""

    vision: Mapping[str, Any]
    where: str  # the file that says so

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen2_5_VLConfig:
        text = TextPart.text_config(raw, where, has_axes=True)
        vision = sub_config(raw, "vision_config", where)
        return cls(**cls.decoder_fields(*text, OMNI_ROPE), vision=vision, where=where)


class Qwen2_5_VLText(TextPart):
    """The language model of one folder."""

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen2_5_VLTextConfig:
        return Qwen2_5_VLTextConfig.from_json(raw, where)


class Qwen2_5_VL(VisionLanguageModel):
    """Both models of one folder."""

    prompt_reader = Qwen2_5_VLPromptReader
    text_only = Qwen2_5_VLText

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        parts = Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig
        super().__init__(config, VisionTower(*parts, config.vision, config.hidden_size, config.where))

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen2_5_VLConfig:
        return Qwen2_5_VLConfig.from_json(raw, where)
