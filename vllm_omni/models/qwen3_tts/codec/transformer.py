"""The decoder's transformer over a window of frames: RMS norms, rotary positions, SwiGLU, a learnt scale on what each
half adds. Carries the keys and values of the window.

Legend: B rows, n new frames, W the window, H query heads, K key-value heads, d head size, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.banded import attention
from vllm_omni.layers.linear import Linear, MergedLinear
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.rotary import RotaryEmbedding, rotate
from vllm_omni.models.qwen3_tts.codec.config import CodecDecoderConfig
from vllm_omni.models.qwen3_tts.codec.state import Carrying, CodecState

MAX_POSITIONS = 1  # of the rotary embedding's scaling, which this type does not have


class LayerScale(nn.Module):
    """Scales every channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class WindowAttention(Carrying):
    """A frame attends to itself and to the W - 1 before it."""

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window = config.size_of_head, config.sliding_window
        widths = {"q_proj": self.num_heads, "k_proj": self.num_kv_heads, "v_proj": self.num_kv_heads}
        parts = {name: heads * self.head_dim for name, heads in widths.items()}
        self.qkv_proj = MergedLinear(config.hidden_size, parts)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    @property
    def carried_shape(self) -> tuple[int, ...]:
        """Keys and values, the latest last."""
        return (2, self.num_kv_heads, self.window - 1, self.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, state: CodecState) -> Tensor:
        """x: [B, n, D]; cos, sin: [B n, 1, d]; mask: [B, 1, n, W - 1 + n] -> [B, n, D]."""
        num_rows, num_new, _ = x.shape
        query, key, value = (part.flatten(0, 1) for part in self.qkv_proj.project(x))
        query, key = (rotate(part.unflatten(1, (-1, self.head_dim)), cos, sin) for part in (query, key))
        value = value.unflatten(1, (-1, self.head_dim))
        query, key, value = (
            part.unflatten(0, (num_rows, num_new)).transpose(1, 2) for part in (query, key, value)
        )  # [B, heads, n, d]
        both = torch.cat([state[self.key], torch.stack([key, value], dim=1)], dim=3)
        state[self.key] = both[:, :, :, both.shape[3] - (self.window - 1) :]
        made = attention(query, both[:, 0], both[:, 1], mask)
        return self.o_proj(made.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(hidden_size, dict.fromkeys(("gate_proj", "up_proj"), intermediate_size))
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj.project(x)
        return self.down_proj(F.silu(gate) * up)


class TransformerLayer(nn.Module):
    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        self.self_attn = WindowAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn_layer_scale = LayerScale(config.hidden_size)
        self.mlp_layer_scale = LayerScale(config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, state: CodecState) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, state)
        x = x + self.self_attn_layer_scale(attended)
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class FrameCounter(Carrying):
    """How many frames of each row came before."""

    carried_dtype = torch.int64
    carried_shape = ()


class WindowTransformer(nn.Module):
    """Positions run on without an end: only differences below W matter."""

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        self.window = config.sliding_window
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        self.rotary = RotaryEmbedding(config.size_of_head, MAX_POSITIONS, rope)
        self.counter = FrameCounter()
        self.has_projections = config.has_residual_codes
        if self.has_projections:
            self.input_proj = Linear(config.latent_dim, config.hidden_size)
            self.output_proj = Linear(config.hidden_size, config.latent_dim)

    def forward(self, x: Tensor, state: CodecState) -> Tensor:
        """[B, n, latent_dim] -> the same shape."""
        x = self.input_proj(x) if self.has_projections else x
        num_before, num_new = state[self.counter.key], x.shape[1]
        state[self.counter.key] = num_before + num_new
        new = torch.arange(num_new, device=x.device)
        cos, sin = self.rotary((num_before[:, None] + new).flatten(), x.dtype)
        mask = self._mask(num_before, new)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, state)
        x = self.norm(x)
        return self.output_proj(x) if self.has_projections else x

    def _mask(self, num_before: Tensor, new: Tensor) -> Tensor:
        """[B, 1, n, W - 1 + n]: key column c is the frame c - (W - 1) counted from the first new one."""
        frames = torch.arange(1 - self.window, len(new), device=new.device)
        distance = new[:, None] - frames  # [n, W - 1 + n]
        is_near = (distance >= 0) & (distance < self.window)
        is_there = frames >= -num_before[:, None]
        return (is_near & is_there[:, None])[:, None]
