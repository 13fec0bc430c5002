"""The fields of a published Z-Image `transformer/config.json`. Knows no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.patches import PATCH

MAX_MODULATION_WIDTH = 256
COUNTS = ("dim", "n_layers", "n_refiner_layers", "n_heads", "in_channels", "cap_feat_dim")
NUMBERS = ("norm_eps", "rope_theta", "t_scale")
AXES = ("axes_dims", "axes_lens")
NUM_AXES = 3  # time, height, width
MAX_COUNT = 2**20


@dataclass(frozen=True, slots=True)
class ZImageConfig:
    """Those that shape the computation."""

    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    in_channels: int
    cap_feat_dim: int
    norm_eps: float
    qk_norm: bool
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> ZImageConfig:
        return cls.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> ZImageConfig:
        """Reads a published config; what this model does not compute is refused, not ignored."""
        cls._check_types(raw, where)
        expected = {"all_patch_size": [PATCH], "all_f_patch_size": [1], "siglip_feat_dim": None}
        for key, value in expected.items():
            if key in raw and (list(raw[key]) if isinstance(raw[key], (list, tuple)) else raw[key]) != value:
                raise ConfigError(f"{where}: {key}: got {brief(raw[key])}, expected {value!r}")
        if raw.get("n_kv_heads", raw["n_heads"]) != raw["n_heads"]:
            raise ConfigError(f"{where}: n_kv_heads: got {raw['n_kv_heads']}, expected n_heads = {raw['n_heads']}")
        if raw["dim"] // raw["n_heads"] != sum(raw["axes_dims"]):
            raise ConfigError(f"{where}: axes_dims: got {raw['axes_dims']}, expected a sum of dim / n_heads")
        fields = {name: raw[name] for name in cls.__slots__ if name in raw}
        return cls(**{**fields, "axes_dims": tuple(raw["axes_dims"]), "axes_lens": tuple(raw["axes_lens"])})

    @classmethod
    def _check_types(cls, raw: dict[str, Any], where: str) -> None:
        missing = [name for name in cls.__slots__ if name not in raw]
        if missing:
            raise ConfigError(f"{where}: {missing[0]}: missing")
        for key in COUNTS:
            check_number(f"{where}: {key}", raw[key], 1, MAX_COUNT, integer=True, raises=ConfigError)
        for key in NUMBERS:
            check_number(f"{where}: {key}", raw[key], 0, above_low=True, raises=ConfigError)
        for key in AXES:
            sizes = raw[key] if isinstance(raw[key], list | tuple) else []
            if len(sizes) != NUM_AXES:
                raise ConfigError(f"{where}: {key}: got {brief(raw[key])}, expected a list of {NUM_AXES} integers")
            for index, size in enumerate(sizes):
                check_number(f"{where}: {key}[{index}]", size, 1, MAX_COUNT, integer=True, raises=ConfigError)

    @property
    def hidden_dim(self) -> int:
        """Of a feed-forward."""
        return int(self.dim / 3 * 8)

    @property
    def modulation_width(self) -> int:
        return min(self.dim, MAX_MODULATION_WIDTH)
