"""Timesteps as a diffusion transformer takes them: sinusoids, and two linear layers. Knows no model and no sampler.

Legend: R rows, W width of the sinusoids, D width of the model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.linear import Linear

LONGEST_PERIOD = 10000.0


class TimestepEmbedder(nn.Module):
    """[R] float32, of 0 to 1000 -> [R, D]; named as diffusers' TimestepEmbedding."""

    def __init__(self, num_sinusoids: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.linear_1 = Linear(num_sinusoids, dim, bias=bias)
        self.linear_2 = Linear(dim, dim, bias=bias)

    def forward(self, time: Tensor) -> Tensor:
        waves = sinusoids(time, self.num_sinusoids).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


def sinusoids(time: Tensor, width: int) -> Tensor:
    """[R] -> [R, width] float32: cosines, then sines, of periods that grow evenly on a logarithmic scale."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
    angles = time[:, None].float() * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
