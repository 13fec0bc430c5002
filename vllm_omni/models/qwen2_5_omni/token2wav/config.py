"""What of `token2wav_config` in a published Qwen2.5-Omni `config.json` shapes the computation.

Keys that a config leaves out have transformers' defaults, which are the published models' values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from vllm_omni.errors import ConfigError
from vllm_omni.layers.ecapa import check_ecapa
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json

T = TypeVar("T")
OLD_NAMES = {"dim": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}  # of published files
SAMPLE_RATE = 24_000  # the published models'; their config does not say it


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """`dit_config`."""

    hidden_size: int = 1024
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    ff_mult: int = 2
    emb_dim: int = 512
    head_dim: int = 64
    rope_theta: float = 10000.0  # may also stand in `rope_parameters`
    max_position_embeddings: int = 32768
    block_size: int = 24  # mel frames
    look_ahead_layers: tuple[int, ...] = (10,)
    look_backward_layers: tuple[int, ...] = (0, 20)
    repeats: int = 2  # mel frames of a code
    num_embeds: int = 8193
    mel_dim: int = 80
    enc_emb_dim: int = 192
    enc_dim: int = 128
    enc_channels: tuple[int, ...] = (256, 256, 256, 256, 768)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 64
    enc_res2net_scale: int = 2
    enc_se_channels: int = 64

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> DiTConfig:
        rope = raw.get("rope_parameters") or {}
        kind = rope.get("rope_type", "default")
        if kind != "default":
            raise ConfigError(f"{where}: rope_parameters.rope_type: got {brief(kind)}, expected 'default'")
        config = _filled(cls, {**raw, **{key: rope[key] for key in ("rope_theta",) if key in rope}}, where)
        for old, name in OLD_NAMES.items():
            if old in raw and raw[old] != getattr(config, name):
                raise ConfigError(
                    f"{where}: {old}: got {brief(raw[old])}, but {name} is {getattr(config, name)}, and that is what "
                    f"counts; set {name} to the same"
                )
        config._check(where)
        return config

    @property
    def codes_per_grid(self) -> int:
        """Every so many codes, from the first on, a code starts where a block does."""
        return self.block_size // math.gcd(self.block_size, self.repeats)

    @property
    def blocks_back(self) -> int:
        """How many blocks before its own one evaluation sees."""
        return len({layer for layer in self.look_backward_layers if layer < self.num_hidden_layers})

    @property
    def blocks_ahead(self) -> int:
        """How many blocks behind its own one evaluation sees."""
        return len({layer for layer in self.look_ahead_layers if layer < self.num_hidden_layers})

    def _check(self, where: str) -> None:
        check_ecapa(self, where)
        if self.head_dim % 2:
            raise ConfigError(f"{where}: head_dim: got {self.head_dim}, expected an even number")


@dataclass(frozen=True, slots=True)
class BigVGANConfig:
    """`bigvgan_config`."""

    mel_dim: int = 80
    upsample_initial_channel: int = 1536
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    upsample_rates: tuple[int, ...] = (5, 3, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (11, 7, 4, 4, 4, 4)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> BigVGANConfig:
        config = _filled(cls, raw, where)
        config._check(where)
        return config

    @property
    def hop(self) -> int:
        """Samples of a mel frame."""
        return math.prod(self.upsample_rates)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the input of the first upsampling and of the output of every one."""
        return tuple(self.upsample_initial_channel // 2**layer for layer in range(len(self.upsample_rates) + 1))

    def _check(self, where: str) -> None:
        if len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes) or not self.resblock_kernel_sizes:
            raise ConfigError(f"{where}: expected as many resblock_dilation_sizes as resblock_kernel_sizes")
        if any(kernel % 2 == 0 for kernel in self.resblock_kernel_sizes):
            raise ConfigError(f"{where}: resblock_kernel_sizes: got {self.resblock_kernel_sizes}, expected odd numbers")
        if len(self.upsample_rates) != len(self.upsample_kernel_sizes):
            raise ConfigError(f"{where}: expected as many upsample_kernel_sizes as upsample_rates")
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ConfigError(
                    f"{where}: upsample_kernel_sizes: got {kernel}, expected {rate} (the rate), {rate + 2}, ..."
                )
        if self.channels[-1] < 1:
            raise ConfigError(
                f"{where}: upsample_initial_channel: got {self.upsample_initial_channel}, expected at least "
                f"{2 ** len(self.upsample_rates)}"
            )


@dataclass(frozen=True, slots=True)
class Token2WavConfig:
    """Both networks' configurations."""

    dit: DiTConfig
    vocoder: BigVGANConfig

    @classmethod
    def from_folder(cls, folder: Path) -> Token2WavConfig:
        where = f"{folder / 'config.json'}: token2wav_config"
        raw = read_json(folder / "config.json").get("token2wav_config")
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: got {type(raw).__name__}, expected an object; the model makes no sound")
        return cls.from_dict(raw, where)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "token2wav_config") -> Token2WavConfig:
        config = cls(
            DiTConfig.from_dict(raw.get("dit_config") or {}, f"{where}.dit_config"),
            BigVGANConfig.from_dict(raw.get("bigvgan_config") or {}, f"{where}.bigvgan_config"),
        )
        if config.dit.mel_dim != config.vocoder.mel_dim:
            raise ConfigError(
                f"{where}.bigvgan_config.mel_dim: got {config.vocoder.mel_dim}, expected dit_config's, "
                f"{config.dit.mel_dim}"
            )
        return config

    @property
    def max_codes(self) -> int:
        return self.dit.max_position_embeddings // self.dit.repeats


def _filled(cls: type[T], raw: Mapping[str, Any], where: str) -> T:
    """An instance with the known keys of `raw`, every number checked."""
    values: dict[str, Any] = {}
    for entry in fields(cls):  # type: ignore[arg-type]
        value = raw.get(entry.name)
        if value is not None:
            values[entry.name] = _checked(value, str(entry.type), f"{where}: {entry.name}", entry.name)
    return cls(**values)


def _checked(value: Any, kind: str, where: str, name: str) -> Any:
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: got {brief(value)}, expected a list")
        item = "tuple[int, ...]" if kind.startswith("tuple[tuple") else "int"
        return tuple(_checked(entry, item, f"{where}[{index}]", name) for index, entry in enumerate(value))
    low = 0 if name.startswith("look_") else 1  # those are indices of layers
    check_number(where, value, low, integer=kind == "int", raises=ConfigError)
    return value
