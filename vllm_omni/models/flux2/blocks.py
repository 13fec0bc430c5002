"""The blocks of the FLUX.2 transformer: those with two streams, and those in which text and image are one sequence and
attention and feed-forward run side by side. Modulation is shared by all blocks of a kind, so it is given.

Tokens of all rows lie packed. Knows no batch and no step.

Legend: R rows, Nt, Ni packed tokens of text and of images, N of both, D width, M width of the feed-forward, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vllm_omni.layers.heads import HeadShape
from vllm_omni.layers.linear import MergedLinear, RowLinear
from vllm_omni.layers.norm import LayerNorm, RMSNorm
from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.models.flux2.config import Flux2Config
from vllm_omni.worker.diffusion.joint import JointSpans, attended_streams
from vllm_omni.worker.diffusion.packing import HeadNorms, Seen, Span, attended_rows, gated_rows, modulated_rows

QKV = ("to_q", "to_k", "to_v")
Modulation = Sequence[Tensor]  # shift, scale and gate, [R, D] each, of attention; of a stream also of its feed-forward


class HeadNormed(nn.Module):
    """What normalises queries and keys."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.norm_q = RMSNorm(config.attention_head_dim, config.eps)
        self.norm_k = RMSNorm(config.attention_head_dim, config.eps)

    @property
    def norms(self) -> HeadNorms:
        return self.norm_q, self.norm_k


class Stream(HeadNormed):
    """Text's or images' own weights in a block with two streams."""

    def __init__(self, config: Flux2Config, shard: Shard) -> None:
        super().__init__(config)
        dim, widths = config.dim, {"gate": config.mlp_dim, "up": config.mlp_dim}
        self.qkv = MergedLinear(dim, dict.fromkeys(QKV, dim), can_quantize=True, shard=shard)
        self.out = RowLinear(dim, dim, bias=False, can_quantize=True, shard=shard)
        self.linear_in = MergedLinear(dim, widths, can_quantize=True, activation="swiglu", shard=shard)
        self.linear_out = RowLinear(config.mlp_dim, dim, bias=False, can_quantize=True, shard=shard)
        self.norm = LayerNorm(config.eps)

    def modulated_input(self, x: Tensor, spans: Sequence[Span], modulation: Modulation) -> Tensor:
        """What attention computes with: [N, D]."""
        shift, scale = modulation[:2]
        return modulated_rows(x, self.norm, spans, scale, shift)

    def finish(self, x: Tensor, attended: Tensor, spans: Sequence[Span], modulation: Modulation) -> Tensor:
        """What stands behind attention: [N, D], [N, D] -> [N, D]."""
        _, _, gate, shift, scale, gate_ffn = modulation
        x = gated_rows(x, self.out(attended), spans, gate)
        normed = modulated_rows(x, self.norm, spans, scale, shift)
        return gated_rows(x, self.linear_out(self.linear_in(normed)), spans, gate_ffn)


class DoubleBlock(nn.Module):
    """Text and image attend to each other; all else is each stream's own."""

    def __init__(self, config: Flux2Config, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.shape = head_shape(config, shard)
        self.text = Stream(config, shard)
        self.image = Stream(config, shard)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        spans: JointSpans,
        modulations: tuple[Modulation, Modulation],
        seen: Seen | None = None,
    ) -> tuple[Tensor, Tensor]:
        """modulations: of text, of image."""
        text_qkv = self.text.qkv(self.text.modulated_input(text, spans.text, modulations[0]))
        image_qkv = self.image.qkv(self.image.modulated_input(image, spans.image, modulations[1]))
        norms = (self.text.norms, self.image.norms)
        of_text, of_image = attended_streams(text_qkv, image_qkv, spans, self.shape, norms, seen)
        return (
            self.text.finish(text, of_text, spans.text, modulations[0]),
            self.image.finish(image, of_image, spans.image, modulations[1]),
        )


class SingleBlock(HeadNormed):
    """Attention and feed-forward of the same input, their results projected as one."""

    def __init__(self, config: Flux2Config, shard: Shard = WHOLE) -> None:
        super().__init__(config)
        self.shape = head_shape(config, shard)
        dim, mlp_dim = config.dim, config.mlp_dim
        parts = {**dict.fromkeys(QKV, dim), "gate": mlp_dim, "up": mlp_dim}  # published as one
        self.qkv_mlp = MergedLinear(dim, parts, can_quantize=True, shard=shard)
        self.out = RowLinear((dim, mlp_dim), dim, bias=False, can_quantize=True, shard=shard)
        self.norm = LayerNorm(config.eps)

    def forward(self, x: Tensor, spans: Sequence[Span], modulation: Modulation, seen: Seen | None = None) -> Tensor:
        shift, scale, gate = modulation
        qkv, gated = self.qkv_mlp.project_beside(modulated_rows(x, self.norm, spans, scale, shift))
        attended = attended_rows(qkv, spans, self.shape, self.norms, seen)
        return gated_rows(x, self.out(torch.cat([attended, gated], dim=-1)), spans, gate)


def head_shape(config: Flux2Config, shard: Shard) -> HeadShape:
    heads = shard.part(config.num_attention_heads)
    return HeadShape(heads, heads, config.attention_head_dim, are_neighbours=True)
