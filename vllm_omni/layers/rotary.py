"""Rotary position embedding (RoFormer, arXiv 2104.09864), scaled as transformers scales it, and in sections over time,
height and width (M-RoPE, Qwen2-VL, arXiv 2409.12191). Knows no model.

Legend: N tokens of a step, F frequencies: half the size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.rope_config import ORIGINAL, WITH_ORIGINAL, original_positions
from vllm_omni.utils.checks import brief, number_complaint


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions.

    rope: the keys of transformers' `rope_parameters` (`rope_type`, `rope_theta`, `factor`, ...), max_positions: the
    `max_position_embeddings` beside them. `mrope_section` among the keys says how many frequencies turn with time,
    height and width: one axis behind the other, or with `mrope_interleaved` in turn, until height and width have theirs
    (Qwen3-VL, arXiv 2511.21631).
    """

    def __init__(self, head_dim: int, max_positions: int, rope: Mapping[str, Any]) -> None:
        super().__init__()
        self.frequencies, self.scale = rotary_frequencies(head_dim, max_positions, rope)
        self.axes = _section_axes(rope.get("mrope_section"), head_dim, bool(rope.get("mrope_interleaved")))
        self.by_length = _by_length(head_dim, max_positions, rope)

    def forward(self, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """positions: [N], or [3, N] where there are sections -> cos and sin, [N, 1, head_dim], rounded to
        `dtype`. lengths: [N] int64, of how many tokens its sequence was when transformers would compute each, for the
        types that are scaled by that; without them they are as in a short sequence.
        """
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        if positions.ndim == 1:
            places = positions[:, None]
        else:
            assert self.axes is not None, "positions of three axes for a model without mrope_section"
            self.axes = self.axes.to(positions.device)
            places = positions[self.axes].T  # [N, head_dim / 2]
        frequencies = self.frequencies
        if lengths is not None and self.by_length is not None:
            frequencies = self.by_length.frequencies(lengths, frequencies)
        angles = places.float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [N, heads, head_dim]; the halves of the last axis are the real and the imaginary part (the layout of GPT-
    NeoX).
    """
    real, imaginary = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-imaginary, real), dim=-1) * sin


class DynamicFrequencies:
    """The dynamic type beyond its original length: theta grows with the length of the sequence."""

    def __init__(self, head_dim: int, max_positions: int, rope: Mapping[str, Any]) -> None:
        self._head_dim, self._max_positions = head_dim, max_positions
        self._theta, self._factor = rope["rope_theta"], rope["factor"]

    def frequencies(self, lengths: Tensor, usual: Tensor) -> Tensor:
        """lengths: [N], usual: [F] -> [N, F]."""
        longer = lengths.clamp_min(self._max_positions)[:, None]
        growth = self._factor * longer / self._max_positions - (self._factor - 1)
        theta = self._theta * growth ** (self._head_dim / (self._head_dim - 2))
        exponents = torch.arange(0, self._head_dim, 2, device=lengths.device).float() / self._head_dim
        return torch.where(longer > self._max_positions, 1.0 / theta**exponents, usual)


class LongFrequencies:
    """The longrope type: other frequencies for sequences beyond the original length."""

    def __init__(self, head_dim: int, max_positions: int, rope: Mapping[str, Any]) -> None:
        self._original = original_positions(rope, max_positions)
        self._long, _ = _scaled_frequencies(head_dim, max_positions, rope, self._original + 1)

    def frequencies(self, lengths: Tensor, usual: Tensor) -> Tensor:
        """lengths: [N], usual: [F] -> [N, F]."""
        return torch.where(lengths[:, None] > self._original, self._long.to(lengths.device), usual)


def rotary_frequencies(
    head_dim: int, max_positions: int, rope: Mapping[str, Any], where: str = "rope_parameters"
) -> tuple[Tensor, float]:
    """(frequencies [F] float32 of sequences that are not longer than the original length, factor on cosines and sines);
    ConfigError for missing keys and lists of another length.
    """
    rope_type = rope.get("rope_type", "default")
    with torch.device("cpu"):  # also while a model is built on the meta device
        if rope_type == "default":
            return 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)), 1.0
        return _scaled_frequencies(head_dim, max_positions, rope, where=where)


def _section_axes(sections: object, head_dim: int, is_interleaved: bool) -> Tensor | None:
    """[head_dim / 2] int64: the axis (time 0, height 1, width 2) that turns each frequency; None without sections."""
    if sections is None:
        return None
    sizes = list(sections) if isinstance(sections, Sequence) and not isinstance(sections, str) else []
    is_wrong = len(sizes) != 3 or any(number_complaint("", size, 0, integer=True) for size in sizes)
    if is_wrong or 2 * sum(sizes) != head_dim:
        raise ConfigError(
            f"rope_parameters.mrope_section: got {sections!r}, expected three counts that sum to {head_dim // 2}, "
            "half of head_dim"
        )
    with torch.device("cpu"):
        if not is_interleaved:
            return torch.arange(3).repeat_interleave(torch.tensor(sizes))
        axes = torch.zeros(head_dim // 2, dtype=torch.int64)
        for axis in (1, 2):
            axes[axis : 3 * sizes[axis] : 3] = axis
        return axes


def _by_length(
    head_dim: int, max_positions: int, rope: Mapping[str, Any]
) -> DynamicFrequencies | LongFrequencies | None:
    with torch.device("cpu"):
        if rope.get("rope_type") == "dynamic":
            return DynamicFrequencies(head_dim, max_positions, rope)
        return LongFrequencies(head_dim, max_positions, rope) if rope.get("rope_type") == "longrope" else None


def _scaled_frequencies(
    head_dim: int, max_positions: int, rope: Mapping[str, Any], length: int | None = None, where: str = ""
) -> tuple[Tensor, float]:
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = dict(rope)
    for key in ("short_factor", "long_factor"):
        if rope["rope_type"] == "longrope" and len(rope[key]) != head_dim // 2:
            raise ConfigError(
                f"{where}.{key}: got {len(rope[key])} numbers, expected {head_dim // 2}, half of head_dim"
            )
    if rope["rope_type"] in WITH_ORIGINAL:
        known[ORIGINAL] = original_positions(rope, max_positions)
    try:
        config = PretrainedConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope_parameters=known,
        )
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=torch.device("cpu"), seq_len=length)
        is_finite = bool(torch.isfinite(frequencies).all()) and math.isfinite(scale)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _unusable(where, rope, str(error)) from error
    if not is_finite:
        raise _unusable(where, rope, f"frequencies for a head of {head_dim} cannot be made of them")
    return frequencies, float(scale)


def _unusable(where: str, rope: Mapping[str, Any], why: str) -> ConfigError:
    return ConfigError(f"{where}: got {brief(dict(rope))}, expected the keys of type {rope['rope_type']!r} ({why})")
