"""A published Z-Image folder (diffusers ZImagePipeline) as a DiffusionModel: native transformer, diffusers' VAE and
sampler.

Formulas (shift, guidance, normalisation, truncation, latent scaling) are those of diffusers' pipeline_z_image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.models.diffusion import DiffusionModel, Sampler
from vllm_omni.models.loader import load_weights, weights_bytes
from vllm_omni.models.packing import PATCH, Tokens, padded
from vllm_omni.models.z_image import ZImageConfig, ZImageTransformer
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import PortSpec, TensorSpec
from vllm_omni.utils.checks import check_number, did_you_mean
from vllm_omni.utils.files import read_json

EXTRA_KEYS = ("cfg_normalization", "cfg_truncation")
UNUSED_FIELDS = ("strength", "image", "duration_s")
NUM_TRAIN_TIMESTEPS = 1000
SAMPLER_CLASS = "FlowMatchEulerDiscreteScheduler"


class ZImagePipeline(DiffusionModel):
    """Text to image. Guidance adds `scale * (positive - negative)`, so 0 is neutral."""

    default_steps = 50
    default_guidance = 5.0

    def __init__(
        self, transformer: ZImageTransformer, vae: Any, sampler_config: Mapping[str, Any], native_size: int
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.native_size = native_size
        self.num_blocks = len(transformer.layers)
        self._sampler_config = dict(sampler_config)
        self._vae_scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._device = transformer.x_pad_token.device

    @classmethod
    def ports(cls, folder: Path) -> Mapping[str, PortSpec]:
        width = ZImageConfig.from_folder(folder / "transformer").cap_feat_dim
        return {"prompt_embeds": TensorSpec(("T", width)), "negative_prompt_embeds": TensorSpec(("T", width))}

    @classmethod
    def guides(cls, guidance_scale: float) -> bool:
        return guidance_scale > 0

    @classmethod
    def weights_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        return sum(weights_bytes(folder / part, dtype.itemsize) for part in ("transformer", "vae"))

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> ZImagePipeline:
        from diffusers import AutoencoderKL

        config = ZImageConfig.from_folder(folder / "transformer")
        with torch.device("meta"):
            transformer = ZImageTransformer(config)
        transformer.to_empty(device=device).to(dtype).requires_grad_(False).eval()
        load_weights(transformer, folder / "transformer")
        vae = AutoencoderKL.from_pretrained(
            folder / "vae", torch_dtype=dtype, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
        vae = vae.to(device=device, memory_format=torch.channels_last).requires_grad_(False).eval()
        sampler = read_json(folder / "scheduler" / "scheduler_config.json")
        if sampler.get("_class_name") != SAMPLER_CLASS:
            raise ConfigError(f"{folder}/scheduler: got {sampler.get('_class_name')!r}, expected {SAMPLER_CLASS}")
        native_size = read_json(folder / "vae" / "config.json").get("sample_size", 1024)
        return cls(transformer, vae, sampler, int(native_size))

    def check(self, params: DiffusionParams) -> None:
        for name in UNUSED_FIELDS:
            if getattr(params, name) is not None:
                raise InvalidRequestError(
                    f"{name}: Z-Image turns text into images and does not read it; leave it unset"
                )
        for name, value in (params.extra or {}).items():
            if name not in EXTRA_KEYS:
                raise InvalidRequestError(f"extra.{name}: unknown key{did_you_mean(str(name), EXTRA_KEYS)}")
            complaint = None if isinstance(value, bool) else check_number(f"extra.{name}", value, 0)
            if complaint:
                raise InvalidRequestError(complaint)
        multiple = self._vae_scale * PATCH
        longest = min(self.transformer.config.axes_lens[1:]) * multiple
        for name, value in zip(("height", "width"), self.size(params), strict=True):
            if value % multiple or value > longest:
                raise InvalidRequestError(
                    f"{name}: got {value}, expected a multiple of {multiple} and at most {longest}"
                )

    def size(self, params: DiffusionParams) -> tuple[int, int]:
        height, width = params.height, params.width
        return (self.native_size if height is None else height, self.native_size if width is None else width)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.transformer.config.in_channels, height // self._vae_scale, width // self._vae_scale)

    def num_tokens(self, height: int, width: int, text_length: int) -> int:
        patch = self._vae_scale * PATCH
        return padded(height // patch * (width // patch)) + padded(text_length)

    def sampler(self, params: DiffusionParams, num_steps: int, latent_shape: tuple[int, int, int]) -> Sampler:
        from diffusers import FlowMatchEulerDiscreteScheduler

        sampler = FlowMatchEulerDiscreteScheduler.from_config(self._sampler_config)
        sigmas = params.sigmas or torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        num_image_tokens = (latent_shape[1] // PATCH) * (latent_shape[2] // PATCH)
        sampler.set_timesteps(sigmas=list(sigmas), device=self._device, mu=self._shift(num_image_tokens))
        sampler.set_begin_index(0)
        return cast(Sampler, sampler)

    def _shift(self, num_image_tokens: int) -> float:
        """Linear in the picture's tokens; only a sampler with dynamic shifting reads it."""
        config = self._sampler_config
        base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(base_shift + (max_shift - base_shift) / (most - base) * (num_image_tokens - base))

    def encode_text(self, prompt_embeds: Tensor) -> Tensor:
        length = len(prompt_embeds)
        limit = self.transformer.config.axes_lens[0] - 2
        if not 0 < length <= limit - limit % 32:
            raise InvalidRequestError(f"prompt_embeds: got {length} tokens, expected 1 to {limit - limit % 32}")
        missing = padded(length) - length
        features = torch.nn.functional.pad(prompt_embeds.to(self.transformer.x_pad_token), (0, 0, 0, missing))
        is_padding = torch.arange(length + missing, device=self._device) >= length
        return self.transformer.encode_text(features[None], is_padding[None])[0]

    def begin(self, latents: Sequence[Tensor], timesteps: Sequence[float], texts: Sequence[Tensor]) -> Tokens:
        clean = [(NUM_TRAIN_TIMESTEPS - timestep) / NUM_TRAIN_TIMESTEPS for timestep in timesteps]
        return self.transformer.begin(latents, torch.tensor(clean, dtype=torch.float32, device=self._device), texts)

    def run_blocks(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        return self.transformer.run_blocks(tokens, start, stop)

    def finish(self, tokens: Tokens) -> list[Tensor]:
        return [-velocity.float() for velocity in self.transformer.finish(tokens)]

    def guided_now(self, params: DiffusionParams, guidance_scale: float, timestep: float) -> bool:
        truncation = float((params.extra or {}).get("cfg_truncation", 1.0))
        cleanness = (NUM_TRAIN_TIMESTEPS - timestep) / NUM_TRAIN_TIMESTEPS
        return self.guides(guidance_scale) and not (truncation <= 1 and cleanness > truncation)

    def guide(self, positive: Tensor, negative: Tensor, guidance_scale: float, params: DiffusionParams) -> Tensor:
        guided = positive + guidance_scale * (positive - negative)
        limit = float((params.extra or {}).get("cfg_normalization", 0.0))
        if limit > 0:
            most = torch.linalg.vector_norm(positive) * limit
            norm = torch.linalg.vector_norm(guided)
            guided = torch.where(norm > most, guided * (most / norm), guided)
        return guided

    def decode(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        scaled = (latents[None] / config.scaling_factor + config.shift_factor).to(self.vae.dtype)
        decoded = self.vae.decode(scaled.contiguous(memory_format=torch.channels_last)).sample[0]
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return cast(Tensor, (pixels * 255).round().to(torch.uint8).permute(1, 2, 0))
