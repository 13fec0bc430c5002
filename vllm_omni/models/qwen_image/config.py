"""The fields of a published Qwen-Image `transformer/config.json`. Knows no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.patches import PATCH

COUNTS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "in_channels",
    "out_channels",
)
# What no published checkpoint of the pipelines that run here has, and is not computed.
EXPECTED = {
    "patch_size": PATCH,
    "guidance_embeds": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}
NUM_AXES = 3  # picture or reference, height, width
MAX_COUNT = 2**20


@dataclass(frozen=True, slots=True)
class QwenImageConfig:
    """Those that shape the computation."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int  # width of the text encoder's states
    in_channels: int  # of a patch of latents
    out_channels: int  # of the latents
    axes_dims_rope: tuple[int, ...]
    zero_cond_t: bool = False  # whether references are modulated as at timestep 0, that is as clean pictures

    @classmethod
    def from_folder(cls, folder: Path) -> QwenImageConfig:
        return cls.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> QwenImageConfig:
        """Reads a published config; what this model does not compute is refused, not ignored."""
        for key in (*COUNTS, "axes_dims_rope"):
            if key not in raw:
                raise ConfigError(f"{where}: {key}: missing")
        for key in COUNTS:
            check_number(f"{where}: {key}", raw[key], 1, MAX_COUNT, integer=True, raises=ConfigError)
        for key, value in EXPECTED.items():
            if raw.get(key, value) != value:
                raise ConfigError(f"{where}: {key}: got {brief(raw[key])}, expected {value!r}; it is not computed here")
        zero_cond_t = raw.get("zero_cond_t", False)
        if not isinstance(zero_cond_t, bool):
            raise ConfigError(f"{where}: zero_cond_t: got {brief(zero_cond_t)}, expected true or false")
        patch = PATCH * PATCH * raw["out_channels"]
        if raw["in_channels"] != patch:
            raise ConfigError(
                f"{where}: in_channels: got {raw['in_channels']}, expected {patch}, a patch of out_channels"
            )
        axes = _axes(f"{where}: axes_dims_rope", raw["axes_dims_rope"], raw["attention_head_dim"])
        return cls(**{key: raw[key] for key in COUNTS}, axes_dims_rope=axes, zero_cond_t=zero_cond_t)

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def _axes(where: str, sizes: object, head_dim: int) -> tuple[int, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) != NUM_AXES:
        raise ConfigError(f"{where}: got {brief(sizes)}, expected a list of {NUM_AXES} even numbers")
    for index, size in enumerate(sizes):
        check_number(f"{where}[{index}]", size, 2, MAX_COUNT, integer=True, raises=ConfigError)
    if any(size % 2 for size in sizes) or sum(sizes) != head_dim:
        raise ConfigError(f"{where}: got {brief(sizes)}, expected even numbers with the sum {head_dim}")
    return tuple(int(size) for size in sizes)
