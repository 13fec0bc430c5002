"""What the decoder upsamples with: ConvNeXt blocks between frames and features, Snake blocks down to samples.

Everything lies as [B, n, C].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.linear import Linear
from vllm_omni.layers.snake import SnakeBeta
from vllm_omni.models.qwen3_tts.codec.config import (
    DILATIONS,
    NEXT_KERNEL,
    RESIDUAL_KERNEL,
    CodecDecoderConfig,
)
from vllm_omni.models.qwen3_tts.codec.convolution import CausalConv, DepthwiseConv, TransposedConv
from vllm_omni.models.qwen3_tts.codec.state import CodecState

NEXT_FACTOR, NEXT_EPS = 4, 1e-6


class Snake(SnakeBeta):
    """Of channels that come last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """A convolution within channels, then a wide layer across them (arXiv 2201.03545)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv(channels, NEXT_KERNEL)
        self.norm = nn.LayerNorm(channels, eps=NEXT_EPS)
        self.pwconv1 = Linear(channels, NEXT_FACTOR * channels)
        self.pwconv2 = Linear(NEXT_FACTOR * channels, channels)
        self.gamma = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, state: CodecState) -> Tensor:
        wide = F.gelu(self.pwconv1(self.norm(self.dwconv(x, state))))
        return x + self.gamma * self.pwconv2(wide)


class FeatureUpsampling(nn.ModuleList):
    """`ratio` features for each; [0] and [1] are published names."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__(
            [TransposedConv(channels, channels, ratio, overlaps=False, trims_start=False), ConvNeXtBlock(channels)]
        )

    def forward(self, x: Tensor, state: CodecState, *, is_first: bool) -> Tensor:
        upsample, block = self
        return block(upsample(x, state, is_first=is_first), state)


class ResidualUnit(nn.Module):
    """x + conv(act(dilated conv(act(x))))."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1, self.act2 = Snake(channels), Snake(channels)
        self.conv1 = CausalConv(channels, channels, RESIDUAL_KERNEL, dilation)
        self.conv2 = CausalConv(channels, channels, 1)

    def forward(self, x: Tensor, state: CodecState) -> Tensor:
        return x + self.conv2(self.act2(self.conv1(self.act1(x), state)), state)


class SampleUpsampling(nn.Module):
    """`rate` times the steps of half the channels."""

    def __init__(self, config: CodecDecoderConfig, index: int) -> None:
        super().__init__()
        before, after = config.channels[index : index + 2]
        upsample = TransposedConv(
            before, after, config.upsample_rates[index], overlaps=True, trims_start=config.trims_start
        )
        units = (ResidualUnit(after, dilation) for dilation in DILATIONS)
        self.block = nn.ModuleList([Snake(before), upsample, *units])

    def forward(self, x: Tensor, state: CodecState, *, is_first: bool) -> Tensor:
        act, upsample, *units = self.block
        x = upsample(act(x), state, is_first=is_first)
        for unit in units:
            x = unit(x, state)
        return x
