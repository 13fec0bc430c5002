"""The thinker of Qwen3-Omni (arXiv 2509.17765): a Qwen3 decoder with sparse experts and positions of three axes in
turn, that reads text, images, audio and video and writes text. Loads the `thinker.*` tensors of the published
checkpoints; those of the Thinking and Captioner variants have nothing else.

Legend: M rows of one item, D hidden size, S layers that pictures join behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_omni.layers.causal_lm import CausalLM, CausalLMConfig
from vllm_omni.layers.decoder import sub_config
from vllm_omni.layers.experts import DEFAULTS, ExpertsConfig
from vllm_omni.layers.weights import Target
from vllm_omni.models.qwen3_omni.prompt_reader import Qwen3OmniPromptReader
from vllm_omni.worker.ar.media_encoders import MediaEncoders
from vllm_omni.worker.ar.media_prompt import MediaItem
from vllm_omni.worker.ar.vision_tower import VisionTower

ROPE: Mapping[str, Any] = {"rope_theta": 1000000.0, "mrope_section": (24, 20, 20)}
EXPERTS: Mapping[str, Any] = {**DEFAULTS, "num_experts": 128, "norm_topk_prob": True}  # transformers'
IN_TURN = {"mrope_interleaved": True}  # whatever a file says, as transformers reads it


@dataclass(frozen=True, slots=True)
class ThinkerConfig(CausalLMConfig):
    """The decoder, and what its encoders are built from."""

    experts: ExpertsConfig
    vision: Mapping[str, Any]
    audio: Mapping[str, Any]
    where: str  # the place in the file that says so

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> ThinkerConfig:
        """From the config.json of a whole checkpoint; ConfigError with the key for what is missing or wrong."""
        thinker = sub_config(raw, "thinker_config", where)
        inside = f"{where}: thinker_config"
        text = sub_config(thinker, "text_config", inside)
        fields = cls.fields_from(text, f"{inside}.text_config", head_dim=None, rope=ROPE)
        has_bias = bool(text.get("attention_bias", False))
        return cls(
            **{**fields, "rope": {**fields["rope"], **IN_TURN}},
            tie_word_embeddings=bool(thinker.get("tie_word_embeddings", False)),
            has_head=True,
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=True,
            experts=ExpertsConfig.from_json(text, f"{inside}.text_config", fields["num_layers"], EXPERTS),
            vision=sub_config(thinker, "vision_config", inside),
            audio=sub_config(thinker, "audio_config", inside),
            where=inside,
        )


class Thinker(CausalLM):
    """The thinker of one folder."""

    prompt_reader = Qwen3OmniPromptReader
    is_capturable = False  # which experts have tokens is asked of the device

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__(config, lambda index: config.experts.make_mlp(config, index))
        self.encoders = _make_encoders(config)

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> ThinkerConfig:
        return ThinkerConfig.from_json(raw, where)

    def encode(self, item: MediaItem) -> Tensor:
        """The rows [M, (1 + S) D] that stand for an image, an audio or a video."""
        return self.encoders.encode(item)

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name."""
        name = name.removeprefix("thinker.")
        if name.startswith("visual."):
            return Target(f"encoders.visual.encoder.{name.removeprefix('visual.')}")
        if name.startswith("audio_tower."):
            return Target(f"encoders.{name}")
        return super().locate(name)

    def is_ignored(self, name: str) -> bool:
        """The tied copy of the embeddings, and buffers of old files."""
        return super().is_ignored(name.removeprefix("thinker.")) or name.endswith(
            (".inv_freq", ".positional_embedding")
        )


def _make_encoders(config: ThinkerConfig) -> MediaEncoders:
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configs
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modules

    visual = modules.Qwen3OmniMoeVisionEncoder, configs.Qwen3OmniMoeVisionEncoderConfig
    audio = modules.Qwen3OmniMoeAudioEncoder, configs.Qwen3OmniMoeAudioEncoderConfig
    tower = VisionTower(*visual, config.vision, config.hidden_size, config.where)
    return MediaEncoders(tower, audio, config.audio, config.where)
