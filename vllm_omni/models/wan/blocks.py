"""The layers of the Wan transformer: self-attention over space and time, cross-attention to a text, feed-forward; over
packed rows of any sizes. Knows no batch, no step and no published names.

Legend: R rows, N packed tokens of all rows, D width, H heads, d head size, t text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_omni.layers.banded import attention
from vllm_omni.layers.heads import HeadShape
from vllm_omni.layers.linear import Linear, MergedLinear
from vllm_omni.layers.modulation import modulated
from vllm_omni.layers.norm import LayerNorm, RMSNorm
from vllm_omni.models.wan.config import WanConfig
from vllm_omni.worker.diffusion.cross_attention import CrossAttentionKV
from vllm_omni.worker.diffusion.packing import Span, attended_rows, gated_rows, joined, modulated_rows


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What all blocks of a step read beside the hidden states."""

    spans: Sequence[Span]  # of attention
    modulated: Sequence[Span]  # their rows are those of `vectors`
    vectors: Tensor  # [R, 6, D], of the timesteps
    reads: Sequence[tuple[slice, CrossAttentionKV]]  # tokens, and the text that they read


class SelfAttention(nn.Module):
    """Queries and keys are normed over all heads together."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_attention_heads
        self.shape = HeadShape(heads, heads, config.attention_head_dim, are_neighbours=True)
        self.qkv = MergedLinear(dim, dict.fromkeys(("to_q", "to_k", "to_v"), dim), bias=True, can_quantize=True)
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        self.out = Linear(dim, dim, can_quantize=True)

    def forward(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        qkv = self.qkv(x)
        query, key, _ = qkv.chunk(3, dim=-1)
        query.copy_(_normed(query, self.norm_q))
        key.copy_(_normed(key, self.norm_k))
        return self.out(attended_rows(qkv, spans, self.shape, None))


class CrossAttention(nn.Module):
    """Every token of a row reads the row's text; no positions."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = config.attention_head_dim
        self.to_q = Linear(dim, dim, can_quantize=True)
        self.keys_values = MergedLinear(dim, dict.fromkeys(("to_k", "to_v"), dim), bias=True, can_quantize=True)
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        self.out = Linear(dim, dim, can_quantize=True)

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[t, D] -> keys and values, [1, H, t, d] each."""
        key, value = self.keys_values.project(states)
        return self._heads(_normed(key, self.norm_k)), self._heads(value.contiguous())

    def forward(self, x: Tensor, reads: Sequence[tuple[slice, CrossAttentionKV]], layer: int) -> Tensor:
        query = self._heads(_normed(self.to_q(x), self.norm_q))
        parts = [attention(query[:, :, tokens], *read.layers[layer], read.bias) for tokens, read in reads]
        return self.out(joined([part[0].transpose(0, 1).flatten(1) for part in parts]))

    def _heads(self, x: Tensor) -> Tensor:
        """[N, D] -> [1, H, N, d]"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None]


class Block(nn.Module):
    """Self-attention and feed-forward, shifted, scaled and gated by the timestep; cross-attention between them."""

    def __init__(self, config: WanConfig, index: int) -> None:
        super().__init__()
        dim = config.dim
        self.index = index
        self.norm = LayerNorm(config.eps)
        self.attn1 = SelfAttention(config)
        self.norm2 = nn.LayerNorm(dim, config.eps)
        self.attn2 = CrossAttention(config)
        self.up = MergedLinear(dim, {"up": config.ffn_dim}, bias=True, can_quantize=True, activation="gelu")
        self.down = Linear(config.ffn_dim, dim, can_quantize=True)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        shift, scale, gate, raised_shift, raised_scale, raised_gate = self._modulation(inputs)
        normed = modulated_rows(x, self.norm, inputs.modulated, scale, shift)
        x = gated_rows(x, self.attn1(normed, inputs.spans), inputs.modulated, gate)
        x = x + self.attn2(self.norm2(x), inputs.reads, self.index)
        raised = self.up(modulated_rows(x, self.norm, inputs.modulated, raised_scale, raised_shift))
        return gated_rows(x, self.down(raised), inputs.modulated, raised_gate)

    def modulated_input(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """[N, D]: what self-attention reads."""
        shift, scale, *_ = self._modulation(inputs)
        return modulated_rows(x, self.norm, inputs.modulated, scale, shift)

    def _modulation(self, inputs: BlockInputs) -> tuple[Tensor, ...]:
        """[R, D] each: shift, scale and gate of attention, then of the feed-forward."""
        return (self.scale_shift_table + inputs.vectors).unbind(1)


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """[N, D], whatever its strides -> the same, contiguous."""
    return modulated(x[None], norm)[0]
