"""The parts of the Z-Image transformer: attention, feed-forward, modulated blocks, timestep embedding, final layer.

Tokens of all rows lie packed in one [N, D] tensor; what is per row works on spans of it. Knows no batch and no step.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width, H heads, A modulation width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.linear import Linear
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.models.z_image.packing import PATCH
from vllm_omni.worker.diffusion.packing import Span, joined, per_span

TIME_FREQUENCIES = 256
TIME_HIDDEN = 1024
ATTENTION_EPS = 1e-5


class TimestepEmbedder(nn.Module):
    """Sinusoids and two linear layers: [R] -> [R, A]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FREQUENCIES, TIME_HIDDEN), nn.SiLU(), Linear(TIME_HIDDEN, width))

    def forward(self, time: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angles = time[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class Attention(nn.Module):
    """Full attention within each row, with normalised queries and keys and rotary positions."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.qkv = Linear(config.dim, 3 * config.dim, bias=False, can_quantize=True)
        self.out = Linear(config.dim, config.dim, bias=False, can_quantize=True)
        self.norm_q = RMSNorm(self.head_dim, ATTENTION_EPS) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(self.head_dim, ATTENTION_EPS) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)  # [N, H, head_dim] each
        query, key = self.norm_q(query), self.norm_k(key)
        attended = [self._attend(query[s.tokens], key[s.tokens], value[s.tokens], s) for s in spans]
        return self.out(joined(attended))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        shape = (span.num_rows, span.length)
        query = rotated(query.unflatten(0, shape), span.rope).transpose(1, 2)  # [rows, H, L, head_dim]
        key = rotated(key.unflatten(0, shape), span.rope).transpose(1, 2)
        value = value.unflatten(0, shape).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1).flatten(1)


class FeedForward(nn.Module):
    """SwiGLU with the gate and the up projection fused."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim / 3 * 8)
        self.w13 = Linear(dim, 2 * hidden, bias=False, can_quantize=True)
        self.w2 = Linear(hidden, dim, bias=False, can_quantize=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; with modulation also scaled and gated by the timestep."""

    def __init__(self, config: ZImageConfig, modulated: bool = True) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.adaLN_modulation = Linear(config.modulation_width, 4 * config.dim) if modulated else None

    def forward(self, x: Tensor, spans: Sequence[Span], condition: Tensor | None = None) -> Tensor:
        if self.adaLN_modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), spans))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        modulation = self.adaLN_modulation(condition)  # [R, 4 D]
        scale_attention, gate_attention, scale_ffn, gate_ffn = modulation.chunk(4, dim=-1)
        normed = self.modulated_input(x, spans, scale_attention)
        x = per_span(gated, spans, x, self.attention_norm2(self.attention(normed, spans)), row=gate_attention)
        normed = per_span(scaled, spans, self.ffn_norm1(x), row=scale_ffn)
        return per_span(gated, spans, x, self.ffn_norm2(self.feed_forward(normed)), row=gate_ffn)

    def modulated_input(self, x: Tensor, spans: Sequence[Span], scale: Tensor) -> Tensor:
        """What a modulated block attends with: [N, D] normed, scaled by [R, D]."""
        return per_span(scaled, spans, self.attention_norm1(x), row=scale)


class FinalLayer(nn.Module):
    """Norm, scale by the timestep, and back to patches."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, PATCH * PATCH * config.in_channels)
        self.adaLN_modulation = Linear(config.modulation_width, config.dim)

    def forward(self, x: Tensor, spans: Sequence[Span], condition: Tensor) -> Tensor:
        scale = self.adaLN_modulation(F.silu(condition))
        return self.linear(per_span(scaled, spans, F.layer_norm(x, x.shape[-1:], eps=1e-6), row=scale))


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x, x, scale)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate.tanh(), update)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates neighbouring pairs of [rows, L, H, head_dim] by rope [L, head_dim / 2, 2], in float32: one complex
    product is several times as fast as four real ones.
    """
    pairs, turns = x.float().unflatten(-1, (-1, 2)), rope[:, None]
    product = torch.view_as_complex(pairs) * torch.view_as_complex(turns)
    return torch.view_as_real(product).flatten(-2).to(x.dtype)
