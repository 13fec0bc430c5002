"""The image, video and audio encoders of Qwen2.5-Omni's thinker (arXiv 2503.20215): transformers' modules, built from
the checkpoint's configuration and filled by our loader.

Legend: M rows of one item, D hidden size of the thinker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.worker.ar.language_model import ComputedBuffers
from vllm_omni.worker.ar.media_prompt import MediaItem
from vllm_omni.worker.ar.vision_tower import VisionTower

BUFFERS = {"positional_embedding.positional_embedding"}


class MediaEncoders(nn.Module, ComputedBuffers):
    """Both encoders, under their published names."""

    def __init__(self, vision: Mapping[str, Any], audio: Mapping[str, Any], hidden_size: int, where: str) -> None:
        super().__init__()
        from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configs
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modules

        self.visual = VisionTower(
            modules.Qwen2_5OmniVisionEncoder, configs.Qwen2_5OmniVisionEncoderConfig, vision, hidden_size, where
        )
        try:
            audio_config = configs.Qwen2_5OmniAudioEncoderConfig(**audio)
        except Exception as error:  # the library raises whatever its validation raises
            raise ConfigError(f"{where}: audio_config cannot be read ({error})") from error
        if audio_config.output_dim != hidden_size:
            raise ConfigError(
                f"{where}: audio_config: gives rows of {audio_config.output_dim}, expected {hidden_size}, the hidden "
                "size"
            )
        self.audio_tower = modules.Qwen2_5OmniAudioEncoder._from_config(audio_config)
        assert {name for name, _ in self.audio_tower.named_buffers()} == BUFFERS, "it holds other buffers than it did"

    def fill_buffers(self) -> None:
        """See ComputedBuffers; the vision tower fills its own."""
        sinusoids = self.audio_tower.positional_embedding
        with torch.device("cpu"):
            waves = sinusoids.compute_default_singular_positional_embedding().float()
        sinusoids.positional_embedding = waves.to(sinusoids.positional_embedding.device)

    def encode(self, item: MediaItem) -> Tensor:
        """One item -> its rows [M, D]."""
        if item.kind != "audio":
            return self.visual.encode(item)
        weight = self.audio_tower.conv1.weight
        features = item.inputs["features"].to(weight.device, weight.dtype)
        lengths = torch.tensor([features.shape[1]], device=weight.device)
        rows: Tensor = self.audio_tower(features, feature_lens=lengths).last_hidden_state
        return rows
