"""A language model that sees: a decoder with positions of three axes, and a vision tower whose rows stand in the place
of placeholder tokens. A family says which tower that is, and who reads its prompts.
"""

from __future__ import annotations

from torch import Tensor

from vllm_omni.layers.causal_lm import CausalLMConfig, TextPart
from vllm_omni.layers.weights import Target
from vllm_omni.worker.ar.media_prompt import MediaItem
from vllm_omni.worker.ar.vision_tower import VisionTower

TOWER = ("visual.", "model.visual.")  # how published names of the tower begin, old and new


class VisionLanguageModel(TextPart):
    """Both parts of one folder."""

    other_parts = ()

    def __init__(self, config: CausalLMConfig, tower: VisionTower) -> None:
        super().__init__(config)
        self.tower = tower

    def encode(self, item: MediaItem) -> Tensor:
        """See MediaReader."""
        return self.tower.encode(item)

    def locate(self, name: str) -> Target | None:
        if name.startswith(TOWER):
            return Target(f"tower.encoder.{name.removeprefix('model.').removeprefix('visual.')}")
        return super().locate(name)

    def is_ignored(self, name: str) -> bool:
        """Also the frequencies of the tower, in files that hold them."""
        return super().is_ignored(name) or name.endswith("rotary_pos_emb.inv_freq")
