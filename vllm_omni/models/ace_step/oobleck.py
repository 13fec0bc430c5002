"""A published AutoencoderOobleck (diffusers; first in Stable Audio Open, arXiv 2407.14358), run in chunks: the memory
that decoding takes is bounded by the chunk, not by its duration, and the chunks fit together without a seam.

What a range of the output depends on is a range of the input, found exactly by walking the layers backwards
(`Geometry`). A chunk is computed from that range and everything else is cut off, so chunked equals whole but for the
order of float additions. The last blocks of the decoder, most of its work, go through a chunk in tiles in the same way.

Legend: C latent channels, T latent frames, n samples, hop samples of a frame (the product of the strides).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.models.ace_step.oobleck_layers import fold_constants, use_channels_last
from vllm_omni.utils.checks import check_number
from vllm_omni.utils.device import is_cpu
from vllm_omni.worker.diffusion.published_part import load_part

MAX_ACTIVATION_BYTES = 2**27  # of the widest layer of a chunk; a few of these live at once
TILED_BLOCKS = 2  # the last ones of the decoder: at a high rate, and with a reach that is short in latent frames
TILE_BYTES = 2**22  # of the widest layer of a tile; a few of these stay in a processor's cache
MIN_STD = 1e-4
RESIDUAL_REACH = 3 * (1 + 3 + 9)  # three residual units in a row, kernel 7 (3 to each side), dilations 1, 3 and 9
EDGE_REACH = 3  # the convolutions next to samples and, in the decoder, next to the latents: kernel 7
LATENT_REACH = 1  # the encoder's last convolution: kernel 3


@dataclass(frozen=True, slots=True)
class Geometry:
    """Lengths and dependencies of encoder and decoder, from the strides alone (`downsampling_ratios`, samples first).

    All ranges are half open and may reach beyond the ends, where the network sees zeros. Both networks are stacks of
    - convolutions of odd kernel k, dilation d, stride 1, padded to keep the length: output [a, b) reads input
      [a - d (k - 1) / 2, b + d (k - 1) / 2);
    - in the encoder, per stride s, a convolution of kernel 2 s, stride s, padding p = ceil(s / 2): output j reads
      inputs j s - p .. j s - p + 2 s - 1. n inputs give floor((n + 2 p) / s) - 1 outputs;
    - in the decoder, per stride s, the transposed one of it: input i reaches outputs i s - p .. i s - p + 2 s - 1, so
      output [a, b) reads input [ceil((a + p - 2 s + 1) / s), floor((b - 1 + p) / s) + 1). n inputs give
      (n - 1) s - 2 p + 2 s outputs: n s for an even s, n s - 1 for an odd one.
    Moving the input of any layer by one step moves its output by exactly the stride, so a chunk that starts at frame f
    has its first sample at f hop, whatever the parity of the strides; only the end of the whole audio is shorter.
    """

    strides: tuple[int, ...]

    @property
    def hop(self) -> int:
        return math.prod(self.strides)

    def num_samples(self, num_frames: int) -> int:
        """How many samples the decoder makes of so many latent frames."""
        for stride in reversed(self.strides):
            num_frames = (num_frames + 1) * stride - 2 * padding_of(stride)
        return num_frames

    def num_frames(self, num_samples: int) -> int:
        """How many latent frames the encoder makes of so many samples."""
        for stride in self.strides:
            num_samples = (num_samples + 2 * padding_of(stride)) // stride - 1
        return num_samples

    def frames_behind(self, start: int, stop: int) -> tuple[int, int]:
        """The latent frames that the decoder's samples [start, stop) depend on."""
        start, stop = self.inputs_behind(start, stop, len(self.strides))
        return start - EDGE_REACH, stop + EDGE_REACH

    def inputs_behind(self, start: int, stop: int, num_blocks: int) -> tuple[int, int]:
        """What of the input of the decoder's last `num_blocks` blocks its samples [start, stop) depend on."""
        start, stop = start - EDGE_REACH, stop + EDGE_REACH
        for stride in self.strides[:num_blocks]:
            start, stop = start - RESIDUAL_REACH, stop + RESIDUAL_REACH
            padding = padding_of(stride)
            start, stop = -(-(start + padding - 2 * stride + 1) // stride), (stop - 1 + padding) // stride + 1
        return start, stop

    def samples_behind(self, start: int, stop: int) -> tuple[int, int]:
        """The samples that the encoder's frames [start, stop) depend on."""
        start, stop = start - LATENT_REACH, stop + LATENT_REACH
        for stride in reversed(self.strides):
            padding = padding_of(stride)
            start, stop = start * stride - padding, (stop - 1) * stride - padding + 2 * stride
            start, stop = start - RESIDUAL_REACH, stop + RESIDUAL_REACH
        return start - EDGE_REACH, stop + EDGE_REACH


def padding_of(stride: int) -> int:
    return -(-stride // 2)


class Oobleck:
    """Encoder and decoder of a `vae` folder, weight norms folded away. Frozen; shared by all requests."""

    def __init__(self, vae: Any, max_activation_bytes: int = MAX_ACTIVATION_BYTES) -> None:
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.sample_rate = int(vae.config.sampling_rate)
        self.channels = int(vae.config.audio_channels)
        self.latent_channels = int(vae.config.decoder_input_channels)
        self.geometry = Geometry(tuple(vae.config.downsampling_ratios))
        weight = self.decoder.conv2.weight
        self._device, self._dtype = weight.device, weight.dtype
        self.frames_of_chunk = _frames_of_chunk(vae, max_activation_bytes)
        tile_bytes = TILE_BYTES if is_cpu(weight.device) else max_activation_bytes
        self.samples_of_tile = max(1, tile_bytes // (vae.config.decoder_channels * weight.element_size()))

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, dtype: torch.dtype, weights_variant: str | None = None
    ) -> Oobleck:
        """Folds constants in float32, then rounds to `dtype`. The folder's configuration has passed `check_config`."""
        from diffusers import AutoencoderOobleck

        with warnings.catch_warnings():  # of what diffusers builds it with, and what `fold_constants` takes away
            warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
            vae = load_part(AutoencoderOobleck, folder, torch.float32, weights_variant)
        fold_constants(vae)
        for part in (vae.encoder, vae.decoder):
            part.to(device=device, dtype=dtype).requires_grad_(False).eval()
        return cls(use_channels_last(vae) if is_cpu(device) else vae)

    def num_pieces(self, num_frames: int) -> int:
        """How many pieces `decode` gives."""
        return -(-num_frames // self.frames_of_chunk)

    def decode(self, latents: Tensor, frames_of_chunk: int | None = None) -> Iterator[Tensor]:
        """[T, C] -> the samples [channels, n], float32, of one chunk of frames after the other."""
        num_frames = len(latents)
        chunk = frames_of_chunk or self.frames_of_chunk
        total, hop = self.geometry.num_samples(num_frames), self.geometry.hop
        for first in range(0, num_frames, chunk):
            start, stop = first * hop, min((first + chunk) * hop, total)
            low, high = self.geometry.frames_behind(start, stop)
            low, high = max(low, 0), min(high, num_frames)
            window = latents[low:high].T[None].to(self._device, self._dtype)
            yield self._decoded(window, start - low * hop, stop - low * hop)

    def _decoded(self, window: Tensor, start: int, stop: int) -> Tensor:
        """The samples [start, stop) of the latents [1, C, T], float32."""
        # 1 the first blocks, on the whole window
        blocks = list(self.decoder.block)
        hidden = self.decoder.conv1(window)
        for block in blocks[:-TILED_BLOCKS]:
            hidden = block(hidden)
        # 2 the last blocks, tile by tile
        samples = torch.empty(self.channels, stop - start, device=self._device)
        hop = math.prod(self.geometry.strides[:TILED_BLOCKS])
        for first in range(start, stop, self.samples_of_tile):
            last = min(first + self.samples_of_tile, stop)
            low, high = self.geometry.inputs_behind(first, last, TILED_BLOCKS)
            low = max(low, 0)
            tile = hidden[:, :, low:high]
            for block in blocks[-TILED_BLOCKS:]:
                tile = block(tile)
            tile = self.decoder.conv2(self.decoder.snake1(tile))
            samples[:, first - start : last - start] = tile[0, :, first - low * hop : last - low * hop]
        return samples

    def encode(self, audio: Tensor, generator: torch.Generator, frames_of_chunk: int | None = None) -> Tensor:
        """[channels, n] -> a draw [T, C] from the posterior, float32: mean + std * noise, the noise from the CPU
        generator. A tail shorter than a frame is left out.
        """
        if audio.ndim != 2 or audio.shape[0] != self.channels:
            raise InvalidRequestError(f"audio: got shape {list(audio.shape)}, expected [{self.channels}, samples]")
        num_frames = self.geometry.num_frames(audio.shape[1])
        if num_frames < 1:
            raise InvalidRequestError(
                f"audio: got {audio.shape[1]} samples, expected at least {self.geometry.hop} (one latent frame)"
            )
        chunk = frames_of_chunk or self.frames_of_chunk
        parts = [self._encoded(audio, i, min(i + chunk, num_frames)) for i in range(0, num_frames, chunk)]
        mean, scale = torch.cat(parts, dim=1).float().chunk(2, dim=0)  # [C, T] each
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32)
        return (mean + (F.softplus(scale) + MIN_STD) * noise.to(mean.device)).T

    def _encoded(self, audio: Tensor, start: int, stop: int) -> Tensor:
        """Frames start .. stop - 1 of the encoder's output, [2 C, frames]."""
        hop = self.geometry.hop
        low, high = self.geometry.samples_behind(start, stop)
        first = max(low, 0) // hop  # a chunk must start where a frame does
        window = audio[:, first * hop : max(high, 0)][None].to(self._device, self._dtype)
        return self.encoder(window)[0, :, start - first : stop - first]


def check_config(raw: dict[str, Any], where: str) -> None:
    """ConfigError for shapes that encoder and decoder cannot have."""
    strides, multiples = raw.get("downsampling_ratios"), raw.get("channel_multiples")
    if not isinstance(strides, list) or not isinstance(multiples, list) or len(strides) != len(multiples):
        raise ConfigError(
            f"{where}: got downsampling_ratios {strides!r} and channel_multiples {multiples!r},"
            " expected two lists of equal length"
        )
    for key in ("encoder_hidden_size", "decoder_channels", "decoder_input_channels", "audio_channels", "sampling_rate"):
        check_number(f"{where}: {key}", raw.get(key), 1, integer=True, raises=ConfigError)
    for index, stride in enumerate(strides):
        check_number(f"{where}: downsampling_ratios[{index}]", stride, 2, integer=True, raises=ConfigError)


def _frames_of_chunk(vae: Any, max_activation_bytes: int) -> int:
    """As many frames as keep the widest activation below the limit; at least one."""
    config = vae.config
    itemsize = vae.decoder.conv2.weight.element_size()
    multiples, samples, widest = [1, *config.channel_multiples], math.prod(config.downsampling_ratios), 0
    channels = max(config.decoder_channels, config.encoder_hidden_size)
    for multiple, stride in zip(multiples, [*config.downsampling_ratios, 1], strict=True):
        widest = max(widest, channels * multiple * samples)
        samples //= stride
    return max(1, max_activation_bytes // (widest * itemsize))
