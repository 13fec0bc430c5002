"""The fields of a published FLUX.2 `transformer/config.json`. Knows no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json

COUNTS = (
    "in_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "timestep_guidance_channels",
)
NUMBERS = ("mlp_ratio", "rope_theta", "eps")
NUM_AXES = 4  # time, height, width, place in the text
MAX_COUNT = 2**20
DEFAULTS: dict[str, Any] = {"timestep_guidance_channels": 256, "eps": 1e-6, "guidance_embeds": True}  # as diffusers'


@dataclass(frozen=True, slots=True)
class Flux2Config:
    """Those that shape the computation."""

    in_channels: int
    num_layers: int  # blocks with two streams
    num_single_layers: int  # blocks in which text and image are one
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int  # of the text's states
    timestep_guidance_channels: int
    mlp_ratio: float
    axes_dims_rope: tuple[int, ...]
    rope_theta: float
    eps: float
    guidance_embeds: bool

    @classmethod
    def from_folder(cls, folder: Path) -> Flux2Config:
        return cls.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> Flux2Config:
        """Reads a published config; what this model does not compute is refused, not ignored."""
        raw = {**DEFAULTS, **raw}
        missing = [name for name in cls.__slots__ if name not in raw]
        if missing:
            raise ConfigError(f"{where}: {missing[0]}: missing")
        for key in COUNTS:
            check_number(f"{where}: {key}", raw[key], 1, MAX_COUNT, integer=True, raises=ConfigError)
        for key in NUMBERS:
            check_number(f"{where}: {key}", raw[key], 0, above_low=True, raises=ConfigError)
        if not isinstance(raw["guidance_embeds"], bool):
            raise ConfigError(f"{where}: guidance_embeds: got {brief(raw['guidance_embeds'])}, expected true or false")
        if raw.get("patch_size", 1) != 1:
            raise ConfigError(f"{where}: patch_size: got {brief(raw['patch_size'])}, expected 1")
        if raw.get("out_channels") not in (None, raw["in_channels"]):
            raise ConfigError(f"{where}: out_channels: got {brief(raw['out_channels'])}, expected in_channels or null")
        axes = raw["axes_dims_rope"]
        if not isinstance(axes, list | tuple) or len(axes) != NUM_AXES:
            raise ConfigError(f"{where}: axes_dims_rope: got {brief(axes)}, expected a list of {NUM_AXES} integers")
        for index, size in enumerate(axes):
            check_number(f"{where}: axes_dims_rope[{index}]", size, 2, MAX_COUNT, integer=True, raises=ConfigError)
        if sum(axes) != raw["attention_head_dim"] or any(size % 2 for size in axes):
            raise ConfigError(
                f"{where}: axes_dims_rope: got {brief(axes)}, expected even sizes that sum up to attention_head_dim "
                f"= {raw['attention_head_dim']}"
            )
        fields = {name: raw[name] for name in cls.__slots__}
        return cls(**{**fields, "axes_dims_rope": tuple(axes)})

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    @property
    def num_blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    @property
    def activation_widths(self) -> int:
        """How often its width a token fills at the widest moment, in a single block: hidden states and their normed
        copy, the projection (3 for queries, keys and values, 2 for each of the feed-forward's) and its halves on their
        own, what attention and feed-forward give, and these joined.
        """
        return math.ceil(10 + 6 * self.mlp_ratio)
