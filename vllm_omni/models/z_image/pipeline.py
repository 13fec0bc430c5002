"""Z-Image as a DiffusionModel: native transformer, diffusers' VAE. Which latents a request starts from, its texts, and
how latents become pixels; scaling as in diffusers' pipeline_z_image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.media.image_input import fitted
from vllm_omni.models.z_image.packing import Tokens, padded
from vllm_omni.models.z_image.trajectory import (
    ZImageTrajectory,
    cleanness,
    guidance_scale,
    num_steps,
    sigmas,
)
from vllm_omni.models.z_image.transformer import ZImageTransformer
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, check_finite
from vllm_omni.worker.diffusion.encoded_images import EncodedImages
from vllm_omni.worker.diffusion.flow_sampler import fresh_sampler, linear_shift
from vllm_omni.worker.diffusion.flow_trajectory import NEGATIVE, POSITIVE
from vllm_omni.worker.diffusion.patches import PATCH
from vllm_omni.worker.diffusion.preview_map import PreviewMap
from vllm_omni.worker.diffusion.previewer import Previewer, to_pixels
from vllm_omni.worker.diffusion.source_image import SourceImage, first_step, latent_mask

NEGATIVE_PORT = "negative_prompt_embeds"


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """Sizes that the checkpoint's VAE implies."""

    native_size: int  # pixels of both sides where a request names none
    vae_scale: int  # pixels of a latent, along each side

    @property
    def multiple(self) -> int:
        """Both sides of a picture are multiples of so many pixels."""
        return self.vae_scale * PATCH

    def size(self, params: DiffusionParams, source: Sequence[int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels of what is made. source: of the picture that it starts from."""
        native = (self.native_size, self.native_size) if source is None else source
        given = (params.height, params.width)
        height, width = (
            side // self.multiple * self.multiple if asked is None else asked
            for asked, side in zip(given, native, strict=True)
        )
        return height, width


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all images of a request share."""

    height: int  # in pixels
    width: int
    texts: Mapping[str, Tensor]  # branch -> [T, D] as the transformer takes them
    source: SourceImage | None


class ZImagePipeline(DiffusionModel):
    """Made by `ZImageSpec.load`."""

    output_port = "image"
    gives_modulated_input = True

    def __init__(
        self,
        transformer: ZImageTransformer,
        vae: Any,
        sampler_config: Mapping[str, Any],
        geometry: ImageGeometry,
        preview_map: PreviewMap | None,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.geometry = geometry
        self.num_blocks = len(transformer.layers)
        self.token_bytes = transformer.config.dim * transformer.x_pad_token.element_size()
        self._sampler_config = sampler_config
        self._device = transformer.x_pad_token.device
        self._previewer = Previewer(preview_map, self.decode_pixels, geometry.vae_scale, self._device)

    def prepare(
        self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int, encoded: EncodedImages
    ) -> Prepared:
        texts = {POSITIVE: self._encode_text(inputs["prompt_embeds"])}
        if guidance_scale(params) > 0:
            if NEGATIVE_PORT not in inputs:
                raise StageError(f"{NEGATIVE_PORT}: not given, but guidance_scale {guidance_scale(params):g} reads it")
            texts[NEGATIVE] = self._encode_text(inputs[NEGATIVE_PORT])
        source = None if params.image is None else self._read_source(params, encoded)
        size = self.geometry.size(params) if source is None else source.pixel_size
        return Prepared(*size, texts, source)

    def trajectory(self, prepared: Prepared, params: DiffusionParams) -> ZImageTrajectory:
        scale = self.geometry.vae_scale
        height, width = prepared.height // scale, prepared.width // scale
        num_image_tokens = (height // PATCH) * (width // PATCH)
        return ZImageTrajectory(
            latent_shape=(self.transformer.config.in_channels, height, width),
            sampler=fresh_sampler(
                self._sampler_config,
                sigmas(params),
                linear_shift(self._sampler_config, num_image_tokens),
                self._device,
                first_step(params, num_steps(params)),
            ),
            num_tokens=sum(padded(num_image_tokens) + len(text) for text in prepared.texts.values()),
            conditions=prepared.texts,
            params=params,
            scale=guidance_scale(params),
            start=first_step(params, num_steps(params)),
            source=prepared.source,
        )

    def adapted(self) -> ZImageTransformer:
        return self.transformer

    def embed(self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Tensor]) -> Tokens:
        clean = [cleanness(timestep) for timestep in timesteps]
        levels = torch.tensor(clean, dtype=torch.float32, device=self._device)
        return self.transformer.embed(latents, levels, conditions)

    def run_blocks(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        return self.transformer.run_blocks(tokens, start, stop)

    def read_tokens(self, plain: Any, tensors: Sequence[Tensor]) -> Tokens:
        return self.transformer.read_tokens(plain, tensors)

    def modulated_input(self, tokens: Tokens) -> list[Tensor]:
        return self.transformer.modulated_input(tokens)

    def unembed(self, tokens: Tokens) -> list[Tensor]:
        return [-velocity.float() for velocity in self.transformer.unembed(tokens)]

    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        decoded = self.decode_pixels(latents)
        check_finite(decoded, "the pixels")
        yield to_pixels(decoded)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        scaled = (latents[None] / config.scaling_factor + config.shift_factor).to(self.vae.dtype)
        decoded = self.vae.decode(scaled.contiguous(memory_format=torch.channels_last)).sample[0]
        return decoded.float() / 2 + 0.5

    def preview(self, latents: Tensor) -> Tensor:
        return self._previewer(latents)

    def _read_source(self, params: DiffusionParams, encoded: EncodedImages) -> SourceImage:
        pixels = encoded.pixels(params.image, "image")
        size = self.geometry.size(params, pixels.shape[:2])
        mean, deviation = encoded.of(fitted(pixels, size), self._encode)
        mask = None
        if params.mask is not None:
            mask = latent_mask(encoded.mask(params.mask, "mask"), size, mean).to(self._device)
        return SourceImage(size, mean, deviation, mask)

    def _encode(self, pixels: Tensor) -> Tensor:
        """uint8 [H, W, 3] -> [2, C, h, w] float32: mean and deviation of the latents, as the sampler has them."""
        config = self.vae.config
        scaled = (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(device=self._device, dtype=self.vae.dtype)
        latents = self.vae.encode(scaled.contiguous(memory_format=torch.channels_last)).latent_dist
        moments = torch.cat([latents.mean - config.shift_factor, latents.std])
        return moments.float().contiguous() * config.scaling_factor

    def _encode_text(self, prompt_embeds: Tensor) -> Tensor:
        """[t, D] states of one prompt -> [T, D], padded to the multiple that the model attends to."""
        length = len(prompt_embeds)
        limit = self.transformer.config.axes_lens[0] - 2
        if not 0 < length <= limit - limit % 32:
            raise InvalidRequestError(f"prompt_embeds: got {length} tokens, expected 1 to {limit - limit % 32}")
        missing = padded(length) - length
        features = torch.nn.functional.pad(prompt_embeds.to(self.transformer.x_pad_token), (0, 0, 0, missing))
        is_padding = torch.arange(length + missing, device=self._device) >= length
        return self.transformer.encode_text(features[None], is_padding[None])[0]
