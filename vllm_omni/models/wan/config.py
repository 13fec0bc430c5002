"""The fields of a published Wan `transformer/config.json`. Knows no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json

COUNTS = (
    *("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels"),
    *("text_dim", "freq_dim", "ffn_dim", "rope_max_seq_len"),
)
# What no published checkpoint that makes videos of words (and of a first frame) has, and is not computed.
EXPECTED: dict[str, Any] = {
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
DEFAULTS = {"rope_max_seq_len": 1024}
MAX_COUNT = 2**20
MAX_PATCH = 16


@dataclass(frozen=True, slots=True)
class WanConfig:
    """Those that shape the computation."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int  # of the latents
    out_channels: int
    text_dim: int  # width of the text encoder's states
    freq_dim: int  # width of the sinusoids of a timestep
    ffn_dim: int
    rope_max_seq_len: int  # positions along each axis
    patch_size: tuple[int, int, int]  # frames, rows and columns of latents in a token
    eps: float

    @classmethod
    def from_folder(cls, folder: Path) -> WanConfig:
        return cls.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> WanConfig:
        """Reads a published config; what this model does not compute is refused, not ignored."""
        raw = {**DEFAULTS, **raw}
        for key in (*COUNTS, "patch_size"):
            if key not in raw:
                raise ConfigError(f"{where}: {key}: missing")
        for key in COUNTS:
            check_number(f"{where}: {key}", raw[key], 1, MAX_COUNT, integer=True, raises=ConfigError)
        for key, value in EXPECTED.items():
            if raw.get(key, value) != value:
                raise ConfigError(f"{where}: {key}: got {brief(raw[key])}, expected {value!r}; it is not computed here")
        for key in ("attention_head_dim", "freq_dim"):
            if raw[key] % 2:
                raise ConfigError(f"{where}: {key}: got {raw[key]}, expected an even number")
        if raw["in_channels"] != raw["out_channels"]:
            raise ConfigError(f"{where}: in_channels: got {raw['in_channels']}, expected out_channels, as many as made")
        eps = raw.get("eps", 1e-6)
        check_number(f"{where}: eps", eps, 0, 1, above_low=True, raises=ConfigError)
        patch = _patch(f"{where}: patch_size", raw["patch_size"])
        return cls(**{key: raw[key] for key in COUNTS}, patch_size=patch, eps=float(eps))

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_channels(self) -> int:
        """Numbers of a token's patch of latents."""
        return self.out_channels * math.prod(self.patch_size)

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Of a head, what turns with the frame, the row and the column."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side


def _patch(where: str, sizes: object) -> tuple[int, int, int]:
    """Of one frame: with more, the frames of a video would not fill their tokens."""
    if not isinstance(sizes, list | tuple) or len(sizes) != 3:
        raise ConfigError(f"{where}: got {brief(sizes)}, expected three numbers: frames, rows, columns")
    for index, size in enumerate(sizes):
        check_number(f"{where}[{index}]", size, 1, MAX_PATCH, integer=True, raises=ConfigError)
    if sizes[0] != 1:
        raise ConfigError(f"{where}[0]: got {sizes[0]}, expected 1 frame")
    return 1, int(sizes[1]), int(sizes[2])
