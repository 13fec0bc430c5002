"""The encoders of a language model that sees and hears: modules of transformers, built from the checkpoint's
configuration and filled by our loader. Each runs once for each picture, video or audio.

Legend: M rows of one item, D hidden size of the language model, S of its first layers that see more of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.worker.ar.language_model import ComputedBuffers
from vllm_omni.worker.ar.media_prompt import MediaItem
from vllm_omni.worker.ar.vision_tower import VisionTower

BUFFERS = {"positional_embedding.positional_embedding"}


class MediaEncoders(nn.Module, ComputedBuffers):
    """Both encoders, under their published names."""

    def __init__(self, visual: VisionTower, audio_classes: tuple[Any, Any], raw: Mapping[str, Any], where: str) -> None:
        """audio_classes: the library's module and its configuration. raw: the audio_config of a config.json, which
        stands at `where`; ConfigError for what the module cannot be built of, and for rows of another width than the
        tower's.
        """
        super().__init__()
        module_class, config_class = audio_classes
        self.visual = visual
        try:
            config = config_class(**raw)
        except Exception as error:  # the library raises whatever its validation raises
            raise ConfigError(f"{where}: audio_config cannot be read ({error})") from error
        if config.output_dim != visual.width:
            raise ConfigError(
                f"{where}: audio_config: gives rows of {config.output_dim}, expected {visual.width}, the hidden size"
            )
        self.audio_tower = module_class._from_config(config)
        assert {name for name, _ in self.audio_tower.named_buffers()} == BUFFERS, "it holds other buffers than it did"

    def fill_buffers(self) -> None:
        """See ComputedBuffers; the vision tower fills its own."""
        sinusoids = self.audio_tower.positional_embedding
        with torch.device("cpu"):
            waves = sinusoids.compute_default_singular_positional_embedding().float()
        sinusoids.positional_embedding = waves.to(sinusoids.positional_embedding.device)

    def encode(self, item: MediaItem) -> Tensor:
        """One item -> its rows [M, (1 + S) D], as InputRows has them; audio adds nothing behind layers."""
        if item.kind != "audio":
            return self.visual.encode(item)
        weight = self.audio_tower.ln_post.weight
        features = item.inputs["features"].to(weight.device, weight.dtype)
        lengths = torch.tensor([features.shape[1]], device=weight.device)
        rows: Tensor = self.audio_tower(features, feature_lens=lengths).last_hidden_state
        return F.pad(rows, (0, self.visual.num_deep * self.visual.width))
