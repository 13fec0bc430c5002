"""The VAE of Qwen-Image, which is one of films (Wan 2.1's) and sees a picture as a film of one frame: its published
configuration, and diffusers' module behind it, without what only further frames would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.film_autoencoder import use_kernels
from vllm_omni.worker.diffusion.published_part import load_part
from vllm_omni.worker.diffusion.tiling import DecodingSize

CLASS = "AutoencoderKLQwenImage"
MAX_CHANNELS = 1024
MAX_HALVINGS = 10
MAX_WIDTH = 2**14
MAX_MOMENT = 1e6
SAMPLE_SIZE = 1024  # pixels of a side that it was trained on
FLOAT_BYTES = 4  # its norms and its upsampling compute in float32, whatever its dtype
LOG_VARIANCES = (-30.0, 20.0)  # as diffusers bounds them


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """What is known before loading."""

    num_channels: int  # of its latents
    scale: int  # pixels of a latent, along each side
    widths: Sequence[int]  # channels of the blocks, those at full resolution first
    raw: dict[str, Any]

    @classmethod
    def from_folder(cls, folder: Path) -> VaeConfig:
        raw, where = read_json(folder / "config.json"), f"{folder}/config.json"
        for key, value in {"_class_name": CLASS, "input_channels": 3}.items():
            if raw.get(key, value) != value:
                raise ConfigError(f"{where}: {key}: got {brief(raw[key])}, expected {value!r}")
        num_channels = raw.get("z_dim", 16)
        check_number(f"{where}: z_dim", num_channels, 1, MAX_CHANNELS, integer=True, raises=ConfigError)
        for key, low in {"latents_mean": -MAX_MOMENT, "latents_std": 0}.items():
            _check_moments(f"{where}: {key}", raw.get(key), num_channels, low)
        halvings = raw.get("temperal_downsample", [False, True, True])
        if not isinstance(halvings, list) or not 1 <= len(halvings) <= MAX_HALVINGS:
            raise ConfigError(
                f"{where}: temperal_downsample: got {brief(halvings)}, expected a list of 1 to {MAX_HALVINGS}"
            )
        return cls(num_channels, 2 ** len(halvings), _read_widths(raw, where, len(halvings) + 1), raw)

    def decoding_size(self) -> DecodingSize:
        """What holds most at full resolution: a block that keeps its input, has halved or kept its channels, and norms
        them by four copies; or the upsampling before it, and the convolution that reads it. Measured within 15%: 799
        bytes for widths of 32, 64, .. in float32, 696 in bfloat16.
        """
        width, before = self.widths[0], self.widths[1]
        widest = max(5 * width + before // 2, 4 * (before // 2) + width, 3 * before)
        return DecodingSize.of_widest(widest * FLOAT_BYTES, self.scale, SAMPLE_SIZE)


class PictureVae:
    """Pixels to latents as the sampler has them, and back."""

    def __init__(self, module: Any, device: torch.device) -> None:
        """module: an AutoencoderKLQwenImage, which is changed."""
        flatten(module)
        self._module = module.to(device=device, memory_format=torch.channels_last)
        use_kernels(self._module)
        self._device = device
        self._mean = torch.tensor(module.config.latents_mean, device=device)[:, None, None]
        self._deviation = torch.tensor(module.config.latents_std, device=device)[:, None, None]

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, variant: str | None) -> PictureVae:
        from diffusers import AutoencoderKLQwenImage

        return cls(load_part(AutoencoderKLQwenImage, folder, dtype, variant), device)

    def decode(self, latents: Tensor) -> Tensor:
        """[C, h, w] -> [3, H, W] float32, 0 to 1 being what can be shown."""
        film = (latents * self._deviation + self._mean).to(self._module.dtype)[None, :, None]
        pixels = self._module.decoder(self._module.post_quant_conv(film))[0, :, 0]
        return pixels.float().clamp(-1, 1) / 2 + 0.5

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [H, W, 3] -> [2, C, h, w] float32: mean and deviation of its latents."""
        scaled = (pixels.permute(2, 0, 1).float() / 127.5 - 1).to(device=self._device, dtype=self._module.dtype)
        moments = self._module.quant_conv(self._module.encoder(scaled[None, :, None]))
        mean, log_variance = moments[0, :, 0].float().chunk(2)
        deviation = torch.exp(log_variance.clamp(*LOG_VARIANCES) / 2)
        return torch.stack([mean - self._mean, deviation]) / self._deviation


class FrameConvolution(nn.Module):
    """A convolution of films, causal in time, that is given one frame: all of its taps in time but the last meet the
    zeros before the first frame, so that it is one of pictures.
    """

    def __init__(self, film: nn.Conv3d) -> None:
        super().__init__()
        height, width = film.kernel_size[1:]
        shape = film.in_channels, film.out_channels, (height, width)
        self.of_pictures = nn.Conv2d(*shape, padding=(height // 2, width // 2), device="meta")
        self.of_pictures.weight = nn.Parameter(film.weight[:, :, -1].clone(), requires_grad=False)
        self.of_pictures.bias = film.bias

    def forward(self, film: Tensor) -> Tensor:
        """[1, C, 1, h, w] -> [1, C', 1, h, w]."""
        found: Tensor = self.of_pictures(film[:, :, 0])
        return found[:, :, None]


def flatten(module: nn.Module) -> None:
    """Replaces all convolutions of films within."""
    for name, part in list(module.named_children()):
        if isinstance(part, nn.Conv3d):
            setattr(module, name, FrameConvolution(part))
        else:
            flatten(part)


def _read_widths(raw: dict[str, Any], where: str, count: int) -> Sequence[int]:
    base, multiples = raw.get("base_dim", 96), raw.get("dim_mult", [1, 2, 4, 4])
    check_number(f"{where}: base_dim", base, 1, MAX_WIDTH, integer=True, raises=ConfigError)
    if not isinstance(multiples, list) or len(multiples) != count:
        raise ConfigError(f"{where}: dim_mult: got {brief(multiples)}, expected {count} numbers")
    for multiple in multiples:
        check_number(f"{where}: dim_mult", multiple, 1, MAX_WIDTH, integer=True, raises=ConfigError)
    return [base * multiple for multiple in multiples]


def _check_moments(where: str, values: object, count: int, low: float) -> None:
    """low: what each must be more than."""
    if not isinstance(values, list) or len(values) != count:
        raise ConfigError(f"{where}: got {brief(values)}, expected a list of {count} numbers")
    for index, value in enumerate(values):
        check_number(f"{where}[{index}]", value, low, MAX_MOMENT, above_low=True, raises=ConfigError)
