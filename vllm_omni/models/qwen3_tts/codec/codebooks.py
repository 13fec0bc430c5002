"""Codes of all codebooks to one hidden state a frame, in both published layouts.

Legend: B rows, n frames, Q codebooks, V entries of one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.weights import Target
from vllm_omni.models.qwen3_tts.codec.config import CodecDecoderConfig

MIN_USAGE = 1e-5
FIRST, REST = "quantizer.rvq_first.", "quantizer.rvq_rest."
SUMS, USAGE = "_codebook.embedding_sum", "_codebook.cluster_usage"
EMBEDDING = "code_embedding.weight"


class ResidualCodebooks(nn.Module):
    """Split residual quantisation: rows of the first codebook, and the sum of rows of all others, are projected by one
    matrix each and added. A row is published as a sum over its cluster and the cluster's size.
    """

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        num_rows, width = config.num_quantizers * config.codebook_size, config.codebook_dim // 2
        self.num_codebooks, self.size = config.num_quantizers, config.codebook_size
        self.rows = nn.Parameter(torch.empty(num_rows, width))
        self.usage = nn.Parameter(torch.empty(num_rows))
        self.first = nn.Parameter(torch.empty(config.codebook_dim, width, 1))
        self.rest = nn.Parameter(torch.empty(config.codebook_dim, width, 1))

    def finish(self, dtype: torch.dtype) -> None:
        """After its weights were loaded in float32."""
        rows = self.rows / self.usage.clamp(min=MIN_USAGE)[:, None]
        self.rows, self.usage = nn.Parameter(rows.to(dtype), False), nn.Parameter(self.usage.new_empty(0), False)
        self.first, self.rest = (nn.Parameter(weight.to(dtype), False) for weight in (self.first, self.rest))

    def forward(self, codes: Tensor) -> Tensor:
        """[B, n, Q] int64 -> [B, n, codebook_dim]."""
        rows = F.embedding(codes + _offsets(codes, self.size), self.rows)  # [B, n, Q, codebook_dim / 2]
        rest = rows[:, :, 1]
        for index in range(2, self.num_codebooks):  # in the reference's order
            rest = rest + rows[:, :, index]
        return F.linear(rows[:, :, 0], self.first[:, :, 0]) + F.linear(rest, self.rest[:, :, 0])

    def locate(self, name: str) -> Target | None:
        for prefix, projection, start in ((FIRST, "first", 0), (REST, "rest", 1)):
            if name == f"{prefix}output_proj.weight":
                return Target(projection)
            number, _, kind = name.removeprefix(f"{prefix}vq.layers.").partition(".")
            if name.startswith(prefix) and number.isdecimal() and kind in (SUMS, USAGE):
                first = (start + int(number)) * self.size
                return Target("rows" if kind == SUMS else "usage", slice(first, first + self.size))
        return None


class SummedCodebooks(nn.Module):
    """The mean of one embedding for each code."""

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        self.num_codebooks, self.size = config.num_quantizers, config.codebook_size
        self.rows = nn.Parameter(torch.empty(config.num_quantizers * config.codebook_size, config.hidden_size))

    def finish(self, dtype: torch.dtype) -> None:
        """After its weights were loaded in float32."""
        self.rows = nn.Parameter(self.rows.to(dtype), False)

    def forward(self, codes: Tensor) -> Tensor:
        """[B, n, Q] int64 -> [B, n, hidden_size]."""
        return F.embedding(codes + _offsets(codes, self.size), self.rows).mean(dim=2)

    def locate(self, name: str) -> Target | None:
        return Target("rows") if name == EMBEDDING else None


def _offsets(codes: Tensor, size: int) -> Tensor:
    """Where each codebook's rows begin."""
    return torch.arange(codes.shape[-1], device=codes.device) * size
