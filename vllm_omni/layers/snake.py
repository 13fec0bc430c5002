"""The periodic activation of vocoders ("Snake", arXiv 2006.08195). Knows no model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.native import diffusion
from vllm_omni.layers.native.library import kernels_for

FILTER_TAPS = 12


class SnakeBeta(nn.Module):
    """x + sin(a x)^2 / b, a and b given by their logarithms. x: as of `snake`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, *self.waves())

    def waves(self) -> tuple[Tensor, Tensor]:
        """Frequency and amplitude, [C] each."""
        return self.alpha.exp(), (self.beta.exp() + 1e-9).reciprocal()


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


def filtered_snake(x: Tensor, frequency: Tensor, amplitude: Tensor, taps: Tensor) -> Tensor:
    """`snake` at twice the rate, so that its overtones do not fold back: filtered up, activated, filtered down; beyond
    its ends the signal stays as it is there. x: [B, C, n] -> the same shape; taps: [12] float32, of both filters.
    """
    functions = kernels_for(x, frequency, amplitude)
    if functions is None or taps.dtype != torch.float32:
        return plain_filtered_snake(x, frequency, amplitude, taps)
    return diffusion.filtered_snake(functions, x.contiguous(), frequency, amplitude, taps)


def plain_filtered_snake(x: Tensor, frequency: Tensor, amplitude: Tensor, taps: Tensor) -> Tensor:
    channels, side = x.shape[1], FILTER_TAPS // 2 - 1
    taps = taps.to(x.dtype).expand(channels, 1, -1)
    x = F.conv_transpose1d(F.pad(x, (side, side), "replicate"), 2 * taps, stride=2, groups=channels)
    x = snake(x[..., 3 * side : -3 * side].contiguous(), frequency, amplitude)
    return F.conv1d(F.pad(x, (side, side + 1), "replicate"), taps, stride=2, groups=channels)


def low_pass_taps() -> Tensor:
    """[12] windowed sinc that halves the band (Kaiser window; transition 0.3 of the rate), its sum 1."""
    half = FILTER_TAPS // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * 0.3 + 7.95
    window = torch.kaiser_window(FILTER_TAPS, periodic=False, beta=0.1102 * (attenuation - 8.7))
    taps = window * torch.sinc(0.5 * (torch.arange(FILTER_TAPS) - half + 0.5))
    return taps / taps.sum()


def plain_snake(x: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:
    wave = (x * frequency[:, None]).sin_().square_()
    return torch.addcmul(x, wave, amplitude[:, None], out=wave)
