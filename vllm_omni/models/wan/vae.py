"""The VAE of Wan 2.1 and 2.2: its published configuration, and diffusers' module behind it, which decodes one frame of
latents after the other. Each frame reads what its causal convolutions kept of those before it, and nothing else of
them: memory does not grow with the length of a video.

Legend: C latent channels, f, h, w frames, rows and columns of latents, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.diffusion_model import check_finite
from vllm_omni.worker.diffusion.film_autoencoder import use_kernels
from vllm_omni.worker.diffusion.published_part import load_part
from vllm_omni.worker.diffusion.tiling import DecodingSize

CLASS = "AutoencoderKLWan"
DTYPE = torch.float32  # as diffusers' documentation has it: in 16 bits pictures lose detail
NUM_CHANNELS = 16  # of a VAE that says nothing, with its moments
MAX_CHANNELS = 1024
MAX_SCALE, MAX_LEVELS = 64, 8
BASE_WIDTH, MAX_WIDTH = 96, 2**14
NUMBERS_OF_CHANNEL = 14.5  # that decoding holds at most, see `decoding_size`
SCALES = ("scale_factor_spatial", "scale_factor_temporal")
MAX_MOMENT = 1e6


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """What is known before loading."""

    num_channels: int  # C
    scale: int  # pixels of a latent, along each side
    frame_scale: int  # frames of every frame of latents but the first, which is one
    raw: Mapping[str, Any]

    @classmethod
    def from_folder(cls, folder: Path) -> VaeConfig:
        raw, where = read_json(folder / "config.json"), f"{folder}/config.json"
        if raw.get("_class_name", CLASS) != CLASS:
            raise ConfigError(f"{where}: _class_name: got {brief(raw['_class_name'])}, expected {CLASS!r}")
        counts = {"z_dim": 16, "scale_factor_spatial": 8, "scale_factor_temporal": 4}  # defaults, as diffusers has them
        counts = {key: raw.get(key, default) for key, default in counts.items()}
        for key, most in {"z_dim": MAX_CHANNELS, "scale_factor_spatial": MAX_SCALE, "scale_factor_temporal": 4}.items():
            check_number(f"{where}: {key}", counts[key], 1, most, integer=True, raises=ConfigError)
        for key, low in {"latents_mean": -MAX_MOMENT, "latents_std": 0}.items():
            if key in raw or counts["z_dim"] != NUM_CHANNELS:
                _check_moments(f"{where}: {key}", raw.get(key), counts["z_dim"], low)
        config = cls(counts["z_dim"], counts["scale_factor_spatial"], counts["scale_factor_temporal"], raw)
        config._check_scales(raw, where)
        for key in ("base_dim", "decoder_base_dim"):
            if raw.get(key) is not None:
                check_number(f"{where}: {key}", raw[key], 1, MAX_WIDTH, integer=True, raises=ConfigError)
        return config

    def decoding_size(self, most_pixels: int) -> DecodingSize:
        """Of one frame of latents. What holds most is the last block, at full resolution: what its convolutions read,
        their temporaries, and what all convolutions keep for the next frame. Measured for each pixel of each frame, by
        the channels that come in and go out: 14.2 numbers in Wan 2.1, 11.8 to 14.0 in Wan 2.2.
        """
        multiples = self.raw.get("dim_mult", [1, 2, 4, 4])
        base = self.raw.get("decoder_base_dim") or self.raw.get("base_dim") or BASE_WIDTH
        before, last = multiples[min(1, len(multiples) - 1)], multiples[0]
        if len(multiples) > 1 and not self.raw.get("is_residual", False):  # the upsampling before it has halved them
            before /= 2
        patch = self.raw.get("patch_size") or 1
        frames = self.frame_scale / patch**2
        num_bytes = NUMBERS_OF_CHANNEL * (before + last) * base * frames * DTYPE.itemsize
        return DecodingSize(self.scale, None, int(num_bytes), most_pixels)

    def _check_scales(self, raw: Mapping[str, Any], where: str) -> None:
        """ConfigError where the scales are not those that the layers make."""
        levels, halvings = raw.get("dim_mult", [1, 2, 4, 4]), raw.get("temperal_downsample", [False, True, True])
        patch = 1 if raw.get("patch_size") is None else raw["patch_size"]
        check_number(f"{where}: patch_size", patch, 1, MAX_SCALE, integer=True, raises=ConfigError)
        for key, values in {"dim_mult": levels, "temperal_downsample": halvings}.items():
            if not isinstance(values, list) or not 1 <= len(values) <= MAX_LEVELS:
                raise ConfigError(f"{where}: {key}: got {brief(values)}, expected a list of 1 to {MAX_LEVELS}")
        made = 2 ** (len(levels) - 1) * patch, 2 ** sum(map(bool, halvings))
        for multiple in levels:
            check_number(f"{where}: dim_mult", multiple, 1, MAX_WIDTH, integer=True, raises=ConfigError)
        for key, got, expected in zip(SCALES, (self.scale, self.frame_scale), made, strict=True):
            if got != expected:
                raise ConfigError(f"{where}: {key}: got {got}, expected {expected}, as its layers make it")


class FilmVae:
    """Frames to latents as the sampler has them, and back."""

    def __init__(self, module: Any, device: torch.device) -> None:
        """module: an AutoencoderKLWan, which is changed."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self._module = module.to(device=device)
        self._device = device
        self._num_kept = sum(isinstance(part, WanCausalConv3d) for part in module.decoder.modules())
        use_kernels(self._module)
        self._mean, self._deviation = (
            torch.tensor(values, device=device)[:, None, None, None]
            for values in (module.config.latents_mean, module.config.latents_std)
        )

    @classmethod
    def load(cls, folder: Path, device: torch.device, variant: str | None) -> FilmVae:
        from diffusers import AutoencoderKLWan

        return cls(load_part(AutoencoderKLWan, folder, DTYPE, variant), device)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """[C, f, h, w] -> for each frame of latents uint8 [frames, H, W, 3], computed when it is asked for."""
        for colours in self._decoded(latents):
            check_finite(colours, "the pixels")
            yield (colours * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()

    def decode_frame(self, latents: Tensor) -> Tensor:
        """[C, h, w], as if it were the first of a video -> [3, H, W], 0 to 1 being what can be shown."""
        return next(self._decoded(latents[:, None]))[:, 0]

    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        """[C, f, h, w] -> [3, frames, H, W], 0 to 1, for each frame of latents."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        patch = self._module.config.patch_size
        film = self._module.post_quant_conv((latents * self._deviation + self._mean).to(DTYPE)[None])
        kept: list[Any] = [None] * self._num_kept  # by the convolutions, of the frames before
        for index in range(film.shape[2]):
            frame = film[:, :, index : index + 1]
            made = self._module.decoder(frame, feat_cache=kept, feat_idx=[0], first_chunk=index == 0)
            pixels: Tensor = made if patch is None else unpatchify(made, patch_size=patch)
            yield pixels[0].clamp(-1, 1) / 2 + 0.5

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [H, W, 3] of a first frame -> [C, h, w] float32, the likeliest latents: nothing is drawn."""
        film = (pixels.permute(2, 0, 1).float() / 127.5 - 1)[None, :, None].to(self._device, DTYPE)
        likeliest = self._module.encode(film).latent_dist.mode()[0]
        return ((likeliest - self._mean) / self._deviation)[:, 0]


def _check_moments(where: str, values: object, count: int, low: float) -> None:
    """low: what each must be more than."""
    if not isinstance(values, list) or len(values) != count:
        raise ConfigError(f"{where}: got {brief(values)}, expected a list of {count} numbers")
    for index, value in enumerate(values):
        check_number(f"{where}[{index}]", value, low, MAX_MOMENT, above_low=True, raises=ConfigError)
