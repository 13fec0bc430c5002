"""What of a published ACE-Step 1.5 `transformer/config.json` shapes the computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class AceStepConfig:
    """The fields of `transformer/config.json` that shape the computation."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    audio_acoustic_hidden_dim: int
    patch_size: int
    sliding_window: int
    encoder_hidden_size: int
    layer_types: tuple[str, ...]  # SLIDING or FULL self-attention, one for each layer
    rope_theta: float
    rms_norm_eps: float
    attention_bias: bool
    is_turbo: bool  # guidance is distilled into the weights

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> AceStepConfig:
        """Reads a published config; what this model does not compute is refused, not ignored."""
        values = {"encoder_hidden_size": raw.get("hidden_size"), **{k: v for k, v in raw.items() if v is not None}}
        counts = [field.name for field in fields(cls) if field.type == "int"]
        for key in (*counts, "in_channels"):
            check_number(f"{where}: {key}", values.get(key), 1, integer=True, raises=ConfigError)
        check_number(f"{where}: rope_theta", values.get("rope_theta"), 0, above_low=True, raises=ConfigError)
        check_number(f"{where}: rms_norm_eps", values.get("rms_norm_eps"), 0, raises=ConfigError)
        config = cls(
            **{key: int(values[key]) for key in counts},
            layer_types=_layer_types(values, where),
            rope_theta=float(values["rope_theta"]),
            rms_norm_eps=float(values["rms_norm_eps"]),
            attention_bias=bool(values.get("attention_bias", False)),
            is_turbo=bool(values.get("is_turbo")) or values.get("model_version") == "turbo",
        )
        config._check_shapes(int(values["in_channels"]), where)
        return config

    def _check_shapes(self, in_channels: int, where: str) -> None:
        if in_channels != 3 * self.audio_acoustic_hidden_dim:
            raise ConfigError(
                f"{where}: in_channels: got {in_channels}, expected {3 * self.audio_acoustic_hidden_dim} (noisy, source"
                " and mask of audio_acoustic_hidden_dim each)"
            )
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ConfigError(
                f"{where}: got {self.num_attention_heads} heads, {self.num_key_value_heads} key-value heads and "
                f"head_dim {self.head_dim}, expected whole groups and an even head_dim"
            )

    @property
    def context_channels(self) -> int:
        """Source latents and mask."""
        return 2 * self.audio_acoustic_hidden_dim

    def num_tokens(self, num_frames: int) -> int:
        return -(-num_frames // self.patch_size)


def _layer_types(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """One kind of self-attention per layer; where the config names none, sliding and full in turn."""
    count = int(values["num_hidden_layers"])
    types = tuple(values.get("layer_types", [FULL if i % 2 else SLIDING for i in range(count)]))
    if len(types) != count or set(types) - {SLIDING, FULL}:
        raise ConfigError(
            f"{where}: layer_types: got {len(types)} of {sorted(map(str, set(types)))}, expected {count} (num_hidden_"
            f"layers) of {SLIDING!r} and {FULL!r}"
        )
    return types
