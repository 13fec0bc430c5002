"""What of a published config.json shapes the decoder that makes audio of codes.

Two published layouts differ in how codes become hidden states, and in whether transposed convolutions drop their
beginning. Keys that a config leaves out have the defaults of the published classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number

T = TypeVar("T")
MAX_SIZE = 2**16  # of any width, count or rate
MAX_THETA = 1e12
HIDDEN_SIZE = 1024
ACTIVATIONS = ("silu",)
EDGE_KERNEL, RESIDUAL_KERNEL, NEXT_KERNEL, FIRST_KERNEL = 7, 7, 7, 3
DILATIONS = (1, 3, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecDecoderConfig:
    """Of the speech tokenizer's decoder; `of_summed_codes` gives the other layout."""

    codebook_size: int = 2048
    num_quantizers: int = 16
    codebook_dim: int = 512  # twice the width of a codebook's row; of the residual layout alone
    latent_dim: int = 1024  # between the parts; of the other layout hidden_size
    hidden_size: int = HIDDEN_SIZE
    intermediate_size: int = 3072
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int | None = None  # hidden_size / num_attention_heads
    sliding_window: int = 72
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # may also stand in `rope_parameters`
    upsampling_ratios: tuple[int, ...] = (2, 2)
    upsample_rates: tuple[int, ...] = (8, 5, 4, 3)
    decoder_dim: int = 1536
    has_residual_codes: bool = field(default=True, metadata={"published": False})  # else embeddings, averaged
    trims_start: bool = field(default=False, metadata={"published": False})  # of transposed convolutions

    @classmethod
    def of_residual_codes(cls, raw: Mapping[str, Any], where: str) -> CodecDecoderConfig:
        """`decoder_config` of a speech tokenizer."""
        return cls._of(raw, where)

    @classmethod
    def of_summed_codes(cls, raw: Mapping[str, Any], where: str) -> CodecDecoderConfig:
        """`code2wav_config` of a model that speaks: embeddings of all codes are averaged, and the transposed
        convolutions of the upsampling blocks drop as many samples at the beginning as at the end.
        """
        given = {**raw, "latent_dim": raw.get("hidden_size", HIDDEN_SIZE)}
        return cls._of(given, where, has_residual_codes=False, trims_start=True)

    @property
    def size_of_head(self) -> int:
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def channels(self) -> tuple[int, ...]:
        """Before the first upsampling block, and after each."""
        return tuple(self.decoder_dim // 2**block for block in range(len(self.upsample_rates) + 1))

    @property
    def frame_samples(self) -> int:
        """Samples of one frame."""
        return math.prod(self.upsampling_ratios) * math.prod(self.upsample_rates)

    @classmethod
    def _of(cls, raw: Mapping[str, Any], where: str, **layout: Any) -> CodecDecoderConfig:
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
        if kind != "default":
            raise ConfigError(f"{where}: rope_parameters: got {brief(kind)}, expected the type 'default'")
        if raw.get("attention_bias"):
            raise ConfigError(f"{where}: attention_bias: got true, expected false; no published codec has one")
        if raw.get("hidden_act", "silu") not in ACTIVATIONS:
            raise ConfigError(f"{where}: hidden_act: got {brief(raw['hidden_act'])}, expected 'silu'")
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        config = cls(**published_values(cls, {**raw, **theta}, where), **layout)
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{where}: num_attention_heads: got {self.num_attention_heads}, expected a multiple of"
                f" num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.size_of_head % 2 or not self.size_of_head:
            raise ConfigError(f"{where}: head_dim: got {self.size_of_head}, expected an even number above 0")
        if self.sliding_window < 2:
            raise ConfigError(f"{where}: sliding_window: got {self.sliding_window}, expected at least 2")
        if self.codebook_dim % 2:
            raise ConfigError(f"{where}: codebook_dim: got {self.codebook_dim}, expected an even number")
        if self.has_residual_codes and self.num_quantizers < 2:
            raise ConfigError(f"{where}: num_quantizers: got {self.num_quantizers}, expected at least 2")
        if not self.upsample_rates or self.decoder_dim % 2 ** len(self.upsample_rates):
            raise ConfigError(
                f"{where}: decoder_dim: got {self.decoder_dim} for {len(self.upsample_rates)} upsample_rates, expected"
                " at least one rate, each of which halves it"
            )
        if self.trims_start and math.prod(self.upsampling_ratios) < 2:
            raise ConfigError(f"{where}: upsampling_ratios: got a product of 1, expected at least 2")


def published_values(cls: type[T], raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The known keys of `raw`, every number checked."""
    values: dict[str, Any] = {}
    for entry in fields(cls):  # type: ignore[arg-type]
        value = raw.get(entry.name)
        if value is not None and entry.metadata.get("published", True):
            values[entry.name] = _checked(value, str(entry.type), f"{where}: {entry.name}")
    return values


def _checked(value: Any, kind: str, where: str) -> Any:
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple) or len(value) > MAX_SIZE:
            raise ConfigError(f"{where}: got {brief(value)}, expected a list")
        return tuple(_checked(entry, "int", f"{where}[{index}]") for index, entry in enumerate(value))
    if kind == "float":
        check_number(where, value, 0, MAX_THETA, above_low=True, raises=ConfigError)
        return float(value)
    check_number(where, value, 1, MAX_SIZE, integer=True, raises=ConfigError)
    return value
