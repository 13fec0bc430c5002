"""The thinker of Qwen2.5-Omni (arXiv 2503.20215): a Qwen2.5 decoder with positions of three axes that reads text,
images, audio and video and writes text. Loads the `thinker.*` tensors of the published checkpoints.

Legend: N tokens of a step, R of them, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vllm_omni.layers.decoder import OMNI_ROPE, Decoder, DecoderConfig, locate_fused, sub_config
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.linear import Embedding, Linear
from vllm_omni.layers.weights import Target
from vllm_omni.models.qwen2_5_omni.prompt_reader import OmniPromptReader
from vllm_omni.worker.ar.media_encoders import MediaEncoders
from vllm_omni.worker.ar.media_prompt import MediaItem
from vllm_omni.worker.ar.vision_tower import VisionTower


@dataclass(frozen=True, slots=True)
class ThinkerConfig(DecoderConfig):
    """The decoder, and what its encoders are built from."""

    vision: Mapping[str, Any]
    audio: Mapping[str, Any]
    tie_word_embeddings: bool
    where: str  # the place in the file that says so

    @property
    def can_write(self) -> bool:
        return True

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> ThinkerConfig:
        """From the config.json of a whole checkpoint; ConfigError with the key for what is missing or wrong."""
        thinker = sub_config(raw, "thinker_config", where)
        inside = f"{where}: thinker_config"
        text = sub_config(thinker, "text_config", inside)
        return cls(
            **cls.fields_from(text, f"{inside}.text_config", head_dim=None, rope=OMNI_ROPE),
            qkv_bias=True,
            output_bias=False,
            head_norms=False,
            vision=sub_config(thinker, "vision_config", inside),
            audio=sub_config(thinker, "audio_config", inside),
            tie_word_embeddings=bool(thinker.get("tie_word_embeddings", False)),
            where=inside,
        )


class Thinker(nn.Module):
    """The thinker of one folder."""

    prompt_reader = OmniPromptReader
    text_only = None
    other_parts = ()
    is_capturable = True
    joins_rows = False

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, is_head=config.tie_word_embeddings)
        self.decoder = Decoder(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False, can_quantize=True)
        )
        self.encoders = _make_encoders(config)

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> ThinkerConfig:
        return ThinkerConfig.from_json(raw, where)

    def forward(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See LanguageModel."""
        embeddings = self.embed_tokens(token_ids)
        if context.input_rows is not None:
            embeddings = context.input_rows.merge(embeddings)
        states: Tensor = self.decoder(embeddings, positions, context)
        return states

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""
        return self.embed_tokens.compute_logits(states) if self.lm_head is None else self.lm_head(states)

    def encode(self, item: MediaItem) -> Tensor:
        """The rows [M, D] that stand for an image, an audio or a video."""
        return self.encoders.encode(item)

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name."""
        name = name.removeprefix("thinker.")
        if name.startswith("visual."):
            return Target(f"encoders.visual.encoder.{name.removeprefix('visual.')}")
        if name.startswith("audio_tower."):
            return Target(f"encoders.{name}")
        if name.startswith("lm_head."):
            return Target(name)
        name = name.removeprefix("model.")
        return locate_fused(self, name if name.startswith("embed_tokens.") else f"decoder.{name}")

    def is_ignored(self, name: str) -> bool:
        """The tied copy of the embeddings, and buffers of old files."""
        is_tied = name == "thinker.lm_head.weight" and self.lm_head is None
        return is_tied or name.endswith((".inv_freq", ".positional_embedding"))


def _make_encoders(config: ThinkerConfig) -> MediaEncoders:
    from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configs
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modules

    visual = modules.Qwen2_5OmniVisionEncoder, configs.Qwen2_5OmniVisionEncoderConfig
    audio = modules.Qwen2_5OmniAudioEncoder, configs.Qwen2_5OmniAudioEncoderConfig
    tower = VisionTower(*visual, config.vision, config.hidden_size, config.where)
    return MediaEncoders(tower, audio, config.audio, config.where)
