"""The ECAPA-TDNN speaker encoder (arXiv 2005.07143): reference audio becomes one vector. Parameters have the names that
models publish them under. Knows no model.

Legend: M mel bins, T frames of the reference, C channels.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError

MIN_VARIANCE = 1e-12


class EcapaShape(Protocol):
    """What of a config shapes the encoder. Channels, kernels and dilations are those of the first layer, of each block,
    and of the layer that joins what the blocks made.
    """

    @property
    def mel_dim(self) -> int: ...
    @property
    def enc_dim(self) -> int: ...  # of the vector
    @property
    def enc_channels(self) -> tuple[int, ...]: ...
    @property
    def enc_kernel_sizes(self) -> tuple[int, ...]: ...
    @property
    def enc_dilations(self) -> tuple[int, ...]: ...
    @property
    def enc_attention_channels(self) -> int: ...
    @property
    def enc_res2net_scale(self) -> int: ...
    @property
    def enc_se_channels(self) -> int: ...


def check_ecapa(shape: EcapaShape, where: str) -> None:
    """ConfigError for lists that do not go together."""
    lengths = {len(shape.enc_channels), len(shape.enc_kernel_sizes), len(shape.enc_dilations)}
    if len(lengths) != 1 or len(shape.enc_channels) < 3:
        raise ConfigError(
            f"{where}: got {len(shape.enc_channels)} enc_channels, {len(shape.enc_kernel_sizes)} enc_kernel_sizes and"
            f" {len(shape.enc_dilations)} enc_dilations, expected equally many, at least 3"
        )
    if sum(shape.enc_channels[1:-1]) != shape.enc_channels[-1]:
        raise ConfigError(
            f"{where}: enc_channels: got {shape.enc_channels[-1]} at the end, expected the sum of those between the"
            f" first and the last, {sum(shape.enc_channels[1:-1])}"
        )


class TimeDelay(nn.Module):
    """A dilated convolution over time that keeps the length (the ends are mirrored), then ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            channels_in, channels_out, kernel, dilation=dilation, padding="same", padding_mode="reflect"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu_()


class Res2Net(nn.Module):
    """The channels in `scale` groups: the first passes, each later one is convolved together with the result before
    it.
    """

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.scale, width = scale, channels // scale
        self.blocks = nn.ModuleList(TimeDelay(width, width, kernel, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.chunk(self.scale, dim=1)
        results = [first]
        for index, (block, group) in enumerate(zip(self.blocks, others, strict=True)):
            results.append(block(group if index == 0 else group + results[-1]))
        return torch.cat(results, dim=1)


class SqueezeExcitation(nn.Module):
    """Scales every channel by what the means of all channels say."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, squeezed, 1)
        self.conv2 = nn.Conv1d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.conv1(x.mean(dim=2, keepdim=True)).relu_()).sigmoid()


class SpeakerBlock(nn.Module):
    """One residual block: convolution, Res2Net, convolution, squeeze and excitation."""

    def __init__(self, config: EcapaShape, index: int) -> None:
        super().__init__()
        before, width = config.enc_channels[index - 1], config.enc_channels[index]
        kernel, dilation = config.enc_kernel_sizes[index], config.enc_dilations[index]
        self.tdnn1 = TimeDelay(before, width)
        self.res2net_block = Res2Net(width, config.enc_res2net_scale, kernel, dilation)
        self.tdnn2 = TimeDelay(width, width)
        self.se_block = SqueezeExcitation(width, config.enc_se_channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))


class AttentivePooling(nn.Module):
    """[1, C, T] -> [1, 2 C, 1]: means and deviations over time, weighted by attention that knows the plain ones."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.tdnn = TimeDelay(3 * channels, hidden)
        self.conv = nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        plain = [part.expand_as(x) for part in _statistics(x, torch.full_like(x[:, :1], 1.0 / x.shape[2]))]
        scores = self.conv(self.tdnn(torch.cat([x, *plain], dim=1)).tanh())
        return torch.cat(_statistics(x, scores.softmax(dim=2)), dim=1)


class EcapaEncoder(nn.Module):
    """[T, M] reference mel -> [enc_dim]."""

    def __init__(self, config: EcapaShape) -> None:
        super().__init__()
        channels, last = config.enc_channels, len(config.enc_channels) - 1
        first = TimeDelay(config.mel_dim, channels[0], config.enc_kernel_sizes[0], config.enc_dilations[0])
        self.blocks = nn.ModuleList([first, *(SpeakerBlock(config, index) for index in range(1, last))])
        self.mfa = TimeDelay(channels[last], channels[last], config.enc_kernel_sizes[last], config.enc_dilations[last])
        self.asp = AttentivePooling(channels[last], config.enc_attention_channels)
        self.fc = nn.Conv1d(2 * channels[last], config.enc_dim, 1)

    def forward(self, mel: Tensor) -> Tensor:
        x, levels = mel.T[None], []
        for block in self.blocks:
            x = block(x)
            levels.append(x)
        return self.fc(self.asp(self.mfa(torch.cat(levels[1:], dim=1))))[0, :, 0]


def _statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and deviation over time, [1, C, 1] each."""
    mean = (weights * x).sum(dim=2, keepdim=True)
    variance = (weights * (x - mean).square()).sum(dim=2, keepdim=True)
    return mean, variance.clamp(min=MIN_VARIANCE).sqrt()
