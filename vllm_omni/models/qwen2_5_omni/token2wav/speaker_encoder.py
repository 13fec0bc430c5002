"""The ECAPA-TDNN speaker encoder (arXiv 2005.07143) of Qwen2.5-Omni's token2wav: reference audio becomes one vector.

Runs once per voice, when the model is loaded. Parameters have their published names.

Legend: M mel bins, T frames of the reference, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_omni.models.qwen2_5_omni.token2wav.config import DiTConfig

MIN_VARIANCE = 1e-12


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

    def __init__(self, config: DiTConfig, index: int) -> None:
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


class SpeakerEncoder(nn.Module):
    """[T, M] reference mel -> [enc_dim]."""

    def __init__(self, config: DiTConfig) -> None:
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
