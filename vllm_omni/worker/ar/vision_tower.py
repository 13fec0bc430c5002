"""The vision encoder of a language model that sees: a module of transformers, built from the checkpoint's configuration
and filled by our loader. It runs once for each picture or video.

Legend: M rows of one item, D hidden size of the language model, S of its first layers that see more of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.worker.ar.language_model import ComputedBuffers
from vllm_omni.worker.ar.media_prompt import MediaItem

BUFFERS = {"rotary_pos_emb.inv_freq", "rotary_pos_emb.original_inv_freq"}


class VisionTower(nn.Module, ComputedBuffers):
    """Encodes pictures and videos. Its parameters are those of `encoder`, under their published names."""

    def __init__(
        self, module_class: Any, config_class: Any, raw: Mapping[str, Any], hidden_size: int, where: str
    ) -> None:
        """raw: the vision_config of a config.json, which stands at `where`; ConfigError for what the module cannot be
        built of, and for rows of another width than hidden_size.
        """
        super().__init__()
        try:
            config = config_class(**raw)
        except Exception as error:  # the library raises whatever its validation raises
            raise ConfigError(f"{where}: vision_config cannot be read ({error})") from error
        if config.out_hidden_size != hidden_size:
            raise ConfigError(
                f"{where}: vision_config: gives rows of {config.out_hidden_size}, expected {hidden_size}, the hidden "
                "size"
            )
        self.width = hidden_size  # D
        self.num_deep = len(getattr(config, "deepstack_visual_indexes", ()))  # S
        self.encoder = module_class._from_config(config)
        assert {name for name, _ in self.encoder.named_buffers()} == BUFFERS, "it holds other buffers than it did"

    def fill_buffers(self) -> None:
        """See ComputedBuffers."""
        rotary = self.encoder.rotary_pos_emb
        with torch.device("cpu"):
            frequencies = rotary.compute_axial_rope_parameters(rotary.config)[0]
        device = rotary.inv_freq.device
        rotary.inv_freq, rotary.original_inv_freq = frequencies.to(device), frequencies.to(device, copy=True)

    def encode(self, item: MediaItem) -> Tensor:
        """A picture or a video -> its rows [M, (1 + S) D], as InputRows has them."""
        weight = self.encoder.patch_embed.proj.weight
        pixels = item.inputs["pixel_values"].to(weight.device, weight.dtype)
        made = self.encoder(pixels, grid_thw=item.inputs["grid_thw"].to(weight.device)[None])
        deep: list[Tensor] = made.deepstack_features if self.num_deep else []
        return torch.cat([made.pooler_output, *deep], dim=1)
