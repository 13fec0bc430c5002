"""The parts of the Z-Image transformer: attention, feed-forward, modulated blocks, timestep embedding, final layer.

Tokens of all rows lie packed in one [N, D] tensor; what is per row works on spans of it. Knows no batch and no step.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width, H heads, A modulation width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.blocks import Blocks
from vllm_omni.layers.heads import HeadShape, head_row
from vllm_omni.layers.linear import Linear, MergedLinear, RowLinear
from vllm_omni.layers.lora import acting
from vllm_omni.layers.native.diffusion_blocks import BlockParts, NativeBlocks
from vllm_omni.layers.norm import LayerNorm, RMSNorm
from vllm_omni.layers.shard import ALONE, Shard, Shards
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.worker.diffusion.packing import Span, attended_rows, gated_rows, modulated_rows
from vllm_omni.worker.diffusion.patches import PATCH
from vllm_omni.worker.diffusion.timestep import sinusoids

TIME_FREQUENCIES = 256
TIME_HIDDEN = 1024
ATTENTION_EPS = 1e-5
FINAL_EPS = 1e-6


class TimestepEmbedder(nn.Module):
    """Sinusoids and two linear layers: [R] -> [R, A]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FREQUENCIES, TIME_HIDDEN), nn.SiLU(), Linear(TIME_HIDDEN, width))

    def forward(self, time: Tensor) -> Tensor:
        waves = sinusoids(time, TIME_FREQUENCIES)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class Attention(nn.Module):
    """Full attention within each row, with normalised queries and keys and rotary positions."""

    def __init__(self, config: ZImageConfig, shards: Shards) -> None:
        super().__init__()
        head_dim, num_heads = config.dim // config.n_heads, shards.tensor.part(config.n_heads)
        self.shape = HeadShape(num_heads, num_heads, head_dim, are_neighbours=True)
        self.sequence = shards.sequence
        parts = dict.fromkeys(("to_q", "to_k", "to_v"), config.dim)
        self.qkv = MergedLinear(config.dim, parts, can_quantize=True, shard=shards.tensor)
        self.out = RowLinear(config.dim, config.dim, bias=False, can_quantize=True, shard=shards.tensor)
        self.norms = None
        if config.qk_norm:
            self.norm_q, self.norm_k = RMSNorm(head_dim, ATTENTION_EPS), RMSNorm(head_dim, ATTENTION_EPS)
            self.norms = (self.norm_q, self.norm_k)

    def forward(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        return self.out(attended_rows(self.qkv(x), spans, self.shape, self.norms, sequence=self.sequence))


class FeedForward(nn.Module):
    """SwiGLU with the gate and the up projection fused."""

    def __init__(self, config: ZImageConfig, shard: Shard) -> None:
        super().__init__()
        dim, hidden = config.dim, config.hidden_dim
        widths = {"w1": hidden, "w3": hidden}
        self.w13 = MergedLinear(dim, widths, can_quantize=True, activation="swiglu", shard=shard)
        self.w2 = RowLinear(hidden, dim, bias=False, can_quantize=True, shard=shard)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w13(x))


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; with modulation also scaled and gated by the timestep."""

    def __init__(self, config: ZImageConfig, modulated: bool = True, shards: Shards = ALONE) -> None:
        super().__init__()
        self.is_whole = shards.tensor.is_whole and shards.sequence.is_whole
        self.attention = Attention(config, shards)
        self.feed_forward = FeedForward(config, shards.tensor)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.adaLN_modulation = Linear(config.modulation_width, 4 * config.dim) if modulated else None

    def forward(self, x: Tensor, spans: Sequence[Span], condition: Tensor | None = None) -> Tensor:
        scale_attention = gate_attention = scale_ffn = gate_ffn = None
        if self.adaLN_modulation is not None:
            modulation = self.adaLN_modulation(condition)  # [R, 4 D]
            scale_attention, gate_attention, scale_ffn, gate_ffn = modulation.chunk(4, dim=-1)
            gate_attention, gate_ffn = gate_attention.tanh(), gate_ffn.tanh()
        normed = self.modulated_input(x, spans, scale_attention)
        x = gated_rows(x, self.attention(normed, spans), spans, gate_attention, self.attention_norm2)
        normed = modulated_rows(x, self.ffn_norm1, spans, scale_ffn)
        return gated_rows(x, self.feed_forward(normed), spans, gate_ffn, self.ffn_norm2)

    def modulated_input(self, x: Tensor, spans: Sequence[Span], scale: Tensor | None) -> Tensor:
        """What a block attends with: [N, D] normed, scaled by [R, D]."""
        return modulated_rows(x, self.attention_norm1, spans, scale)

    def parts(self) -> BlockParts | None:
        """For kernels that run whole blocks; None where ranks exchange something within them."""
        if not self.is_whole:
            return None
        attention, mlp = self.attention, self.feed_forward
        return BlockParts(
            (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2),
            head_row(attention.shape, attention.norms),
            (attention.qkv, attention.out, mlp.w13, mlp.w2),
        )


class Stack(Blocks):
    """Blocks one after the other, by one call of the kernels where their weights are packed for that."""

    _native: NativeBlocks | Literal[False] | None = False

    def run(
        self,
        x: Tensor,
        spans: Sequence[Span],
        condition: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Blocks start .. stop - 1: [N, D] -> [N, D]. condition: [R, A], of those that are modulated."""
        native = self.native() if acting() is None else None  # adapters act on layers one by one
        functions = None if native is None else native.functions(x, condition)
        if native is None or functions is None:
            for block in self.present(start, stop):
                x = block(x, spans, condition)
            return x
        first, last, _ = slice(start, stop).indices(len(self))
        if first >= last:
            return x
        modulations = None if condition is None else self._modulations(first, last, condition)
        return native.run(functions, first, last, x, spans, modulations)

    def native(self) -> NativeBlocks | None:
        """What runs all blocks in one call; looked for once."""
        if self._native is False:
            parts = [cast(Block, block).parts() for block in self]
            known = [part for part in parts if part is not None]
            self._native = NativeBlocks.find(known) if len(known) == len(parts) else None
        return self._native

    def _modulations(self, first: int, last: int, condition: Tensor) -> Tensor:
        """[last - first, R, 4, D]: what each block makes of the condition, the gates bounded."""
        made = torch.stack([block.adaLN_modulation(condition) for block in list(self)[first:last]])  # type: ignore[operator]
        made = made.unflatten(-1, (4, -1))
        made[:, :, 1::2].tanh_()
        return made


class FinalLayer(nn.Module):
    """Norm, scale by the timestep, and back to patches."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(FINAL_EPS)
        self.linear = Linear(config.dim, PATCH * PATCH * config.in_channels)
        self.adaLN_modulation = Linear(config.modulation_width, config.dim)

    def forward(self, x: Tensor, spans: Sequence[Span], condition: Tensor) -> Tensor:
        scale = self.adaLN_modulation(F.silu(condition))
        return self.linear(modulated_rows(x, self.norm, spans, scale))
