"""The periodic activation of vocoders ("Snake", arXiv 2006.08195). Knows no model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_omni.layers.native import diffusion
from vllm_omni.layers.native.library import kernels_for


class SnakeBeta(nn.Module):
    """x + sin(a x)^2 / b, a and b given by their logarithms. x: as of `snake`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.alpha.exp(), (self.beta.exp() + 1e-9).reciprocal())


def snake(x: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:
    """x + amplitude * sin(frequency * x)^2. x: [B, C, n], in memory as that or as [B, n, C]; frequency, amplitude: [C],
    x's dtype -> the same shape, in memory as x is. On a CPU rounded once, at the end.
    """
    functions = kernels_for(x, frequency, amplitude)
    if functions is not None and x.is_contiguous():
        return diffusion.snake(functions, x, frequency, amplitude, channels_last=False)
    if functions is not None and x.transpose(1, 2).is_contiguous():
        return diffusion.snake(functions, x.transpose(1, 2), frequency, amplitude, channels_last=True).transpose(1, 2)
    return plain_snake(x, frequency, amplitude)


def plain_snake(x: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:
    wave = (x * frequency[:, None]).sin_().square_()
    return torch.addcmul(x, wave, amplitude[:, None], out=wave)
