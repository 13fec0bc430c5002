"""BigVGAN's filtered activation, the same values and gradients as transformers' module in half the time on a CPU.

The snake's formula and its gradients are one compiled kernel each, and edges are repeated by concatenation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAntiAliasedActivation1d,
    Qwen2_5OmniToken2WavBigVGANModel,
)


class QuickActivation(nn.Module):
    """In place of one activation, with its parameters under their names. [B, C, n] -> the same shape."""

    taps: Tensor

    def __init__(self, published: Qwen2_5OmniAntiAliasedActivation1d) -> None:
        super().__init__()
        self.act = published.act
        self.register_buffer("taps", published.downsample.filter, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        taps = self.taps.expand(x.shape[1], -1, -1)
        side = taps.shape[-1] // 2 - 1
        x = F.conv_transpose1d(widened(x, side, side), 2 * taps, stride=2, groups=len(taps))
        x = Snake.apply(x[..., 3 * side : -3 * side], self.act.alpha, self.act.beta)
        return F.conv1d(widened(x, side, side + 1), taps, stride=2, groups=len(taps))


def with_quick_activations(vocoder: Qwen2_5OmniToken2WavBigVGANModel) -> Qwen2_5OmniToken2WavBigVGANModel:
    """The same module, its activations replaced; its state has the same names."""
    for block in vocoder.resblocks:
        block.activations = nn.ModuleList(QuickActivation(activation) for activation in block.activations)
    vocoder.activation_post = QuickActivation(vocoder.activation_post)
    return vocoder


class Snake(torch.autograd.Function):
    """x + sin(a x)^2 / b, a and b given by their logarithms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha, beta)
        found: Tensor = snake(x, alpha, beta)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        found: tuple[Tensor, Tensor, Tensor] = snake_gradients(gradient, *ctx.saved_tensors)
        return found


@torch.compile(dynamic=True)
def snake(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    a, inverse = alpha.exp()[:, None], (beta.exp() + 1e-9).reciprocal()[:, None]
    return x + (x * a).sin().square() * inverse


@torch.compile(dynamic=True)
def snake_gradients(gradient: Tensor, x: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, alpha and beta."""
    a, inverse = alpha.exp()[:, None], (beta.exp() + 1e-9).reciprocal()[:, None]
    turned = (2 * a * x).sin()
    scaled = gradient * inverse
    of_alpha = (scaled * turned * a * x).sum((0, 2))
    of_beta = -(scaled * (a * x).sin().square() * inverse).sum((0, 2)) * beta.exp()
    return gradient + scaled * a * turned, of_alpha, of_beta


def widened(x: Tensor, left: int, right: int) -> Tensor:
    """Its ends repeated."""
    return torch.cat([x[..., :1].expand(-1, -1, left), x, x[..., -1:].expand(-1, -1, right)], dim=-1)
