"""Rotary position embedding (RoFormer, arXiv 2104.09864), scaled as transformers scales it, and in sections over time,
height and width (M-RoPE, Qwen2-VL, arXiv 2409.12191). Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import number_complaint

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions.

    rope: the keys of transformers' `rope_parameters` (`rope_type`, `rope_theta`, `factor`, ...). Positions stay below
    `max_positions`, where the dynamic type equals the default one. `mrope_section` among the keys says how many
    frequencies turn with time, height and width.
    """

    def __init__(self, head_dim: int, max_positions: int, rope: Mapping[str, Any]) -> None:
        super().__init__()
        self.frequencies, self.scale = rotary_frequencies(head_dim, max_positions, rope)
        self.axes = _section_axes(rope.get("mrope_section"), head_dim)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: [N] int64, or [3, N] where there are sections -> cos and sin, [N, 1, head_dim], rounded to
        `dtype`.
        """
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        if positions.ndim == 1:
            places = positions[:, None]
        else:
            assert self.axes is not None, "positions of three axes for a model without mrope_section"
            self.axes = self.axes.to(positions.device)
            places = positions[self.axes].T  # [N, head_dim / 2]
        angles = places.float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [N, heads, head_dim]; the halves of the last axis are the real and the imaginary part (the layout of GPT-
    NeoX).
    """
    real, imaginary = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-imaginary, real), dim=-1) * sin


def rotary_frequencies(head_dim: int, max_positions: int, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    """(frequencies [head_dim / 2] float32, factor on cosines and sines); ConfigError for an unknown type or missing
    keys.
    """
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"rope_parameters.rope_type: got {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}")
    with torch.device("cpu"):  # also while a model is built on the meta device
        if rope_type == "default":
            return 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)), 1.0
        return _scaled_frequencies(head_dim, max_positions, rope)


def _section_axes(sections: object, head_dim: int) -> Tensor | None:
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
        return torch.arange(3).repeat_interleave(torch.tensor(sizes))


def _scaled_frequencies(head_dim: int, max_positions: int, rope: Mapping[str, Any]) -> tuple[Tensor, float]:
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        config = PretrainedConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope_parameters=dict(rope),
        )
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=torch.device("cpu"))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"rope_parameters: got {dict(rope)!r}, expected the keys of type {rope['rope_type']!r} ({error})"
        ) from error
    return frequencies, float(scale)
