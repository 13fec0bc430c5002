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

BUFFERS = {
    "visual.rotary_pos_emb.inv_freq",
    "visual.rotary_pos_emb.original_inv_freq",
    "audio_tower.positional_embedding.positional_embedding",
}


class MediaEncoders(nn.Module, ComputedBuffers):
    """Both encoders, under their published names."""

    def __init__(self, vision: Mapping[str, Any], audio: Mapping[str, Any], hidden_size: int, where: str) -> None:
        super().__init__()
        from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni as configs
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modules

        try:
            vision_config = configs.Qwen2_5OmniVisionEncoderConfig(**vision)
            audio_config = configs.Qwen2_5OmniAudioEncoderConfig(**audio)
        except Exception as error:  # the library raises whatever its validation raises
            raise ConfigError(f"{where}: vision_config or audio_config cannot be read ({error})") from error
        widths = {"vision_config": vision_config.out_hidden_size, "audio_config": audio_config.output_dim}
        for name, width in widths.items():
            if width != hidden_size:
                raise ConfigError(f"{where}: {name}: gives rows of {width}, expected {hidden_size}, the hidden size")
        self.visual = modules.Qwen2_5OmniVisionEncoder._from_config(vision_config)
        self.audio_tower = modules.Qwen2_5OmniAudioEncoder._from_config(audio_config)
        assert {name for name, _ in self.named_buffers()} == BUFFERS, "the encoders hold other buffers than they did"

    def fill_buffers(self) -> None:
        """See ComputedBuffers."""
        rotary, sinusoids = self.visual.rotary_pos_emb, self.audio_tower.positional_embedding
        with torch.device("cpu"):
            frequencies = rotary.compute_axial_rope_parameters(rotary.config)[0]
            waves = sinusoids.compute_default_singular_positional_embedding().float()
        device = rotary.inv_freq.device
        rotary.inv_freq, rotary.original_inv_freq = frequencies.to(device), frequencies.to(device, copy=True)
        sinusoids.positional_embedding = waves.to(device)

    def encode(self, item: MediaItem) -> Tensor:
        """One item -> its rows [M, D]."""
        weight = self.audio_tower.conv1.weight
        inputs = {name: tensor.to(weight.device) for name, tensor in item.inputs.items()}
        if item.kind == "audio":
            features = inputs["features"].to(weight.dtype)
            lengths = torch.tensor([features.shape[1]], device=weight.device)
            return self.audio_tower(features, feature_lens=lengths).last_hidden_state
        pixels = inputs["pixel_values"].to(weight.dtype)
        return self.visual(pixels, grid_thw=inputs["grid_thw"][None]).pooler_output
