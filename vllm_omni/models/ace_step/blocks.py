"""The layers of the ACE-Step 1.5 transformer, over packed rows of any durations. Knows no published names of weights.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width, H query heads, K key-value heads, d head size,
t text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.band import Band
from vllm_omni.layers.banded import attention
from vllm_omni.layers.heads import HeadShape
from vllm_omni.layers.linear import Linear, MergedLinear
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.models.ace_step.config import SLIDING, AceStepConfig
from vllm_omni.worker.diffusion.cross_attention import CrossAttentionKV
from vllm_omni.worker.diffusion.packing import Span, attended_rows, gated_rows, modulated_rows

TIME_FREQUENCIES = 256
TIME_SCALE = 1000.0


class TimeEmbedding(nn.Module):
    """[R] in [0, 1] -> [R, D], and through one more layer [R, 6, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(TIME_FREQUENCIES, width)
        self.linear_2 = Linear(width, width)
        self.time_proj = Linear(width, 6 * width)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angles = time[:, None].float() * TIME_SCALE * torch.exp(-math.log(10000.0) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding = self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class SelfAttention(nn.Module):
    """Grouped-query attention within each row, with normalised queries and keys and rotary positions. window: how far a
    token sees to each side; None is everywhere.
    """

    def __init__(self, config: AceStepConfig, window: int | None) -> None:
        super().__init__()
        self.band = None if window is None else Band.window(window)
        heads = config.num_attention_heads, config.num_key_value_heads
        self.shape = HeadShape(*heads, config.head_dim, are_neighbours=False)
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = {"to_q": query, "to_k": key, "to_v": key}
        self.qkv = MergedLinear(config.hidden_size, parts, bias=config.attention_bias, can_quantize=True)
        self.out = Linear(query, config.hidden_size, bias=config.attention_bias, can_quantize=True)
        self.norm_q = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        norms = (self.norm_q, self.norm_k)
        return self.out(attended_rows(self.qkv(x), spans, self.shape, norms, band=self.band))


class CrossAttention(nn.Module):
    """Every token of a row reads the row's text; no positions."""

    def __init__(self, config: AceStepConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.to_q = Linear(config.hidden_size, query, bias=config.attention_bias, can_quantize=True)
        self.keys_values = MergedLinear(
            config.hidden_size, {"to_k": key, "to_v": key}, bias=config.attention_bias, can_quantize=True
        )
        self.out = Linear(query, config.hidden_size, bias=config.attention_bias, can_quantize=True)
        self.norm_q = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.rms_norm_eps)

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[t, D] -> keys and values, [1, K, t, d] each."""
        key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.keys_values.project(states))
        return self.norm_k(key).transpose(0, 1)[None].contiguous(), value.transpose(0, 1)[None].contiguous()

    def forward(self, x: Tensor, reads: Sequence[tuple[slice, CrossAttentionKV]], layer: int) -> Tensor:
        query = self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim))).transpose(0, 1)[None]  # [1, H, N, d]
        attended = [attention(query[:, :, tokens], *read.layers[layer])[0] for tokens, read in reads]
        return self.out((attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)).transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: AceStepConfig) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up = MergedLinear(config.hidden_size, parts, can_quantize=True, activation="swiglu")
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, can_quantize=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_up(x))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a norm; the first and the last shifted, scaled and
    gated by the timestep.
    """

    def __init__(self, config: AceStepConfig, index: int) -> None:
        super().__init__()
        self.index = index
        window = config.sliding_window if config.layer_types[index] == SLIDING else None
        self.self_attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, window)
        self.cross_attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, config.hidden_size))

    def forward(
        self, x: Tensor, spans: Sequence[Span], reads: Sequence[tuple[slice, CrossAttentionKV]], modulation: Tensor
    ) -> Tensor:
        rows = self.scale_shift_table + modulation  # [R, 6, D]: shift, scale, gate of attention, then of feed-forward
        # 1 self-attention
        normed = self.modulated_input(x, spans, modulation)
        x = gated_rows(x, self.self_attn(normed, spans), spans, rows[:, 2])
        # 2 cross-attention, which the timestep does not touch
        normed = modulated_rows(x, self.cross_attn_norm, spans, None)
        x = x + self.cross_attn(normed, reads, self.index)
        # 3 feed-forward
        normed = modulated_rows(x, self.mlp_norm, spans, rows[:, 4], rows[:, 3])
        return gated_rows(x, self.mlp(normed), spans, rows[:, 5])

    def modulated_input(self, x: Tensor, spans: Sequence[Span], modulation: Tensor) -> Tensor:
        """What self-attention reads: [N, D] normed, scaled and shifted by the timestep's [R, 6, D]."""
        rows = self.scale_shift_table + modulation
        return modulated_rows(x, self.self_attn_norm, spans, rows[:, 1], rows[:, 0])
