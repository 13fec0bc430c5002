"""The parts of the Qwen-Image transformer: a block with a stream of text and one of images, which are modulated and
projected apart and attend to each other; the last layer.

Tokens of all rows lie packed, [Nt, D] and [Ni, D]. Knows no batch and no step.

Legend: R rows, Nt, Ni packed tokens of text and images, D width, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vllm_omni.layers.heads import HeadShape
from vllm_omni.layers.linear import Linear, MergedLinear, RowLinear
from vllm_omni.layers.modulation import modulated
from vllm_omni.layers.norm import LayerNorm, RMSNorm
from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.models.qwen_image.config import QwenImageConfig
from vllm_omni.worker.diffusion.joint import JointSpans, attended_streams
from vllm_omni.worker.diffusion.packing import Span, gated_rows, joined, modulated_rows

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class StreamInputs:
    """How a step modulates one stream."""

    spans: Sequence[Span]  # the rows of a span are those of the vectors that modulate its tokens
    vectors: Tensor  # [R, D] of the timesteps, through SiLU; for images maybe [2 R, D], behind each that of timestep 0


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What all blocks of a step read beside the hidden states."""

    spans: JointSpans  # of attention
    text: StreamInputs
    image: StreamInputs


class Stream(nn.Module):
    """What a block has once for text and once for images."""

    def __init__(self, config: QwenImageConfig, shard: Shard) -> None:
        super().__init__()
        dim = config.dim
        self.modulation = Linear(dim, 6 * dim)
        self.norm = LayerNorm(EPS)
        parts = dict.fromkeys(("to_q", "to_k", "to_v"), dim)
        self.qkv = MergedLinear(dim, parts, bias=True, can_quantize=True, shard=shard)
        self.norm_q, self.norm_k = RMSNorm(config.attention_head_dim, EPS), RMSNorm(config.attention_head_dim, EPS)
        self.out = RowLinear(dim, dim, can_quantize=True, shard=shard)
        self.up = MergedLinear(dim, {"up": 4 * dim}, bias=True, can_quantize=True, activation="gelu", shard=shard)
        self.down = RowLinear(4 * dim, dim, can_quantize=True, shard=shard)

    def modulation_of(self, inputs: StreamInputs) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the feed-forward, each as many as there are vectors."""
        return self.modulation(inputs.vectors).chunk(6, dim=-1)

    def attention_input(self, x: Tensor, inputs: StreamInputs, modulation: Sequence[Tensor]) -> Tensor:
        """Normed, scaled and shifted."""
        shift, scale = modulation[:2]
        return modulated_rows(x, self.norm, inputs.spans, scale, shift)

    def finish(self, x: Tensor, attended: Tensor, inputs: StreamInputs, modulation: Sequence[Tensor]) -> Tensor:
        """Adds what was attended to, then what the feed-forward makes of it."""
        gate_attention, shift, scale, gate = modulation[2:]
        x = gated_rows(x, self.out(attended), inputs.spans, gate_attention)
        raised = self.up(modulated_rows(x, self.norm, inputs.spans, scale, shift))
        return gated_rows(x, self.down(raised), inputs.spans, gate)


class Block(nn.Module):
    """Joint attention of both streams, then a feed-forward in each."""

    def __init__(self, config: QwenImageConfig, shard: Shard = WHOLE) -> None:
        super().__init__()
        heads = shard.part(config.num_attention_heads)
        self.shape = HeadShape(heads, heads, config.attention_head_dim, are_neighbours=True)
        self.text, self.image = Stream(config, shard), Stream(config, shard)
        self.norms = ((self.text.norm_q, self.text.norm_k), (self.image.norm_q, self.image.norm_k))

    def forward(self, text: Tensor, image: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        of_text, of_image = self.text.modulation_of(inputs.text), self.image.modulation_of(inputs.image)
        text_qkv = self.text.qkv(self.text.attention_input(text, inputs.text, of_text))
        image_qkv = self.image.qkv(self.image.attention_input(image, inputs.image, of_image))
        attended = attended_streams(text_qkv, image_qkv, inputs.spans, self.shape, self.norms)
        return (
            self.text.finish(text, attended[0], inputs.text, of_text),
            self.image.finish(image, attended[1], inputs.image, of_image),
        )

    def modulated_input(self, text: Tensor, image: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        """What the block attends with, of both streams."""
        return (
            self.text.attention_input(text, inputs.text, self.text.modulation_of(inputs.text)),
            self.image.attention_input(image, inputs.image, self.image.modulation_of(inputs.image)),
        )


class FinalLayer(nn.Module):
    """Norm, scale and shift by the timestep, and back to patches."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(EPS)
        self.modulation = Linear(config.dim, 2 * config.dim)
        self.linear = Linear(config.dim, config.in_channels)

    def forward(self, parts: Sequence[Tensor], rows: Sequence[slice], vectors: Tensor) -> list[Tensor]:
        """[rows, L, D] of each group, where its rows stand, and [R, D], through SiLU -> [rows, L, 4 C] of each."""
        scale, shift = self.modulation(vectors)[:, None].chunk(2, dim=-1)
        normed = [
            modulated(part, self.norm, scale[which], shift[which]) for part, which in zip(parts, rows, strict=True)
        ]
        projected = self.linear(joined([part.flatten(0, 1) for part in normed]))
        split = projected.split([part.shape[0] * part.shape[1] for part in normed])
        return [found.unflatten(0, part.shape[:2]) for found, part in zip(split, normed, strict=True)]
