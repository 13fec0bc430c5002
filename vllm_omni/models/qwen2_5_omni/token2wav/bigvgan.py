"""The BigVGAN vocoder (arXiv 2206.04658) as Qwen2.5-Omni publishes it, run in pieces: the memory that it needs is
bounded by the piece, and the pieces fit together without a seam.

What a range of samples depends on is a range of mel frames, found exactly by walking the layers backwards
(`Geometry`). A piece is computed from that range and the rest is cut off, so pieces equal the whole but for the order
of float additions.

Legend: M mel bins, T mel frames, C channels, n steps of a layer, hop samples of a frame (the product of the rates).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_omni.layers.snake import SnakeBeta, filtered_snake, low_pass_taps
from vllm_omni.models.qwen2_5_omni.token2wav.config import BigVGANConfig

MAX_ACTIVATION_BYTES = 2**27  # of the widest layer of a piece; a few of these live at once
ACTIVATION_REACH = 5  # both filters together, see Geometry
EDGE_KERNEL = 7  # of the convolutions next to the mel and next to the samples
MIN_LEVEL_DB, REFERENCE_DB = -115.0, 20.0
MAX_PIECE_FRAMES = 4096


@dataclass(frozen=True, slots=True)
class Geometry:
    """Which mel frames a range of samples depends on.

    All ranges are half open and may reach beyond the ends, where the network sees its padding. From the mel to the
    samples there follow one another
    - a convolution of odd kernel k, dilation d, padded to keep the length: output [a, b) reads input
      [a - d (k - 1) / 2, b + d (k - 1) / 2);
    - a transposed convolution of kernel k, stride s, padding p = (k - s) / 2: input i reaches outputs
      i s - p .. i s - p + k - 1, so output [a, b) reads input [ceil((a + p - k + 1) / s), floor((b - 1 + p) / s) + 1);
      n inputs give n s;
    - an activation at twice the rate, between two filters of 12 taps: up, input i reaches 2 i - 5 .. 2 i + 6; down,
      output j reads 2 j - 5 .. 2 j + 6; together output j reads inputs j - 5 .. j + 5.
    A residual block of kernel k and dilations d is, for each d, an activation, a convolution of dilation d, an
    activation and a convolution of dilation 1; the widest of the blocks side by side counts.
    """

    config: BigVGANConfig

    @property
    def residual_reach(self) -> int:
        """How far a step sees through the residual blocks, to each side."""
        blocks = zip(self.config.resblock_kernel_sizes, self.config.resblock_dilation_sizes, strict=True)
        return max(
            sum(2 * ACTIVATION_REACH + (kernel - 1) // 2 * (dilation + 1) for dilation in dilations)
            for kernel, dilations in blocks
        )

    def frames_behind(self, start: int, stop: int) -> tuple[int, int]:
        """The mel frames that the samples [start, stop) depend on."""
        edge = (EDGE_KERNEL - 1) // 2
        start, stop = start - edge - ACTIVATION_REACH, stop + edge + ACTIVATION_REACH
        layers = list(zip(self.config.upsample_rates, self.config.upsample_kernel_sizes, strict=True))
        for stride, kernel in reversed(layers):
            start, stop = start - self.residual_reach, stop + self.residual_reach
            padding = (kernel - stride) // 2
            start, stop = -(-(start + padding - kernel + 1) // stride), (stop - 1 + padding) // stride + 1
        return start - edge, stop + edge

    @property
    def reach(self) -> tuple[int, int]:
        """How many frames before and behind its own the samples of one frame depend on."""
        low, high = self.frames_behind(0, self.config.hop)
        return -low, high - 1


class Activation(nn.Module):
    """SnakeBeta at twice the rate, between two filters."""

    taps: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(channels)
        self.register_buffer("taps", low_pass_taps(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, C, n] -> the same shape."""
        return filtered_snake(x, *self.act.waves(), self.taps)


class ResidualBlock(nn.Module):
    """For each dilation x + conv(act(dilated conv(act(x))))."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        reach = (kernel - 1) // 2
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * reach) for dilation in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=reach) for _ in dilations)
        self.activations = nn.ModuleList(Activation(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.activations[::2], self.convs1, self.activations[1::2], self.convs2, strict=True)
        for activation, dilated, second_activation, plain in pairs:
            x = x + plain(second_activation(dilated(activation(x))))
        return x


class BigVGAN(nn.Module):
    """Log mel spectrograms -> samples in [-1, 1]. Parameters have their published names."""

    def __init__(self, config: BigVGANConfig, max_activation_bytes: int = MAX_ACTIVATION_BYTES) -> None:
        super().__init__()
        self.config, self.geometry = config, Geometry(config)
        self.frames_of_piece = _frames_of_piece(config, max_activation_bytes)
        channels, edge = config.channels, (EDGE_KERNEL - 1) // 2
        self.conv_pre = nn.Conv1d(config.mel_dim, channels[0], EDGE_KERNEL, padding=edge)
        layers = zip(channels, channels[1:], config.upsample_rates, config.upsample_kernel_sizes, strict=False)
        self.ups = nn.ModuleList(
            nn.ModuleList([nn.ConvTranspose1d(wide, narrow, kernel, stride, padding=(kernel - stride) // 2)])
            for wide, narrow, stride, kernel in layers
        )
        kinds = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, kernel, dilations) for width in channels[1:] for kernel, dilations in kinds
        )
        self.num_side_by_side = len(kinds)
        self.activation_post = Activation(channels[-1])
        self.conv_post = nn.Conv1d(channels[-1], 1, EDGE_KERNEL, padding=edge, bias=False)

    def fill_buffers(self) -> None:
        """Writes the filters' taps, which no checkpoint holds, into a model that was built on the meta device."""
        for module in self.modules():
            if isinstance(module, Activation):
                module.taps = low_pass_taps().to(module.taps.device)

    def forward(self, mel: Tensor) -> Tensor:
        """[T, M] natural logarithms of amplitudes -> [1, T hop]."""
        return self.synthesise(normalised_decibels(mel).T[None])[0].clamp(-1.0, 1.0)

    def synthesise(self, x: Tensor) -> Tensor:
        """[1, M, T] in [-1, 1] -> [1, 1, T hop], not clipped."""
        x = self.conv_pre(x)
        for layer, upsampling in enumerate(self.ups):
            x = upsampling[0](x)  # type: ignore[index]
            first = layer * self.num_side_by_side
            blocks = self.resblocks[first : first + self.num_side_by_side]
            x = torch.stack([block(x) for block in blocks]).mean(dim=0)
        return self.conv_post(self.activation_post(x))

    def num_pieces(self, num_frames: int) -> int:
        """How many pieces `decode` gives for so many kept frames."""
        return -(-num_frames // self.frames_of_piece)

    def decode(self, mel: Tensor, kept: slice, frames_of_piece: int | None = None) -> Iterator[Tensor]:
        """The samples [1, n], float32, of the kept ones of the frames [T, M], piece by piece. What lies around them is
        their context; where it ends, the audio is taken to end.
        """
        num_frames, hop = len(mel), self.config.hop
        first_kept, last_kept, _ = kept.indices(num_frames)
        piece = frames_of_piece or self.frames_of_piece
        for first in range(first_kept, last_kept, piece):
            start, stop = first * hop, min(first + piece, last_kept) * hop
            low, high = self.geometry.frames_behind(start, stop)
            low, high = max(low, 0), min(high, num_frames)
            yield self(mel[low:high])[:, start - low * hop : stop - low * hop]


def normalised_decibels(mel: Tensor) -> Tensor:
    """Natural logarithms of amplitudes -> decibels against the reference, its range of 115 dB as [-1, 1]."""
    decibels = (mel * (20.0 / math.log(10.0))).clamp(min=MIN_LEVEL_DB) - REFERENCE_DB
    return (2.0 * (decibels - MIN_LEVEL_DB) / -MIN_LEVEL_DB - 1.0).clamp(-1.0, 1.0)


def _frames_of_piece(config: BigVGANConfig, max_activation_bytes: int) -> int:
    """As many frames as keep the widest activation (float32, at twice the rate) below the limit; at least one."""
    samples, widest = 1, 0
    for channels, rate in zip(config.channels[1:], config.upsample_rates, strict=True):
        samples *= rate
        widest = max(widest, 2 * channels * samples)
    return max(1, min(max_activation_bytes // (4 * widest), MAX_PIECE_FRAMES))
