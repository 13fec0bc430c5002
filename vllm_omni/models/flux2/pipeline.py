"""FLUX.2 [klein] as a DiffusionModel: native transformer, diffusers' VAE. What a request's texts and pictures become,
and how latents become pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.models.flux2.autoencoder import Flux2Autoencoder
from vllm_omni.models.flux2.pictures import Size, cropped, pictures_of, soft_mask, stretched, whole_size
from vllm_omni.models.flux2.trajectory import (
    KleinTrajectory,
    first_step,
    guidance_scale,
    is_guided,
    num_steps,
    shift,
)
from vllm_omni.models.flux2.transformer import Condition, Flux2Transformer, Reference
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, check_finite
from vllm_omni.worker.diffusion.encoded_images import EncodedImages
from vllm_omni.worker.diffusion.flow_sampler import even_sigmas, fresh_sampler
from vllm_omni.worker.diffusion.flow_trajectory import NEGATIVE, POSITIVE
from vllm_omni.worker.diffusion.joint import JointTokens
from vllm_omni.worker.diffusion.preview_map import PreviewMap
from vllm_omni.worker.diffusion.previewer import Previewer, to_pixels
from vllm_omni.worker.diffusion.source_image import SourceImage

NEGATIVE_PORT = "negative_prompt_embeds"
NATIVE_SIDE = 1024  # pixels of both sides where nothing says more


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes that the checkpoint's VAE implies."""

    vae_scale: int  # pixels of the VAE's latents, along each side; two by two of them are one of the transformer's

    @property
    def multiple(self) -> int:
        """Pixels of a latent of the transformer, of which both sides of a picture are multiples."""
        return 2 * self.vae_scale

    def size(self, params: DiffusionParams, pictures: Sequence[Size]) -> Size:
        """Of what is made. pictures: sizes of those that the request brings; the first says what parameters do not."""
        native = whole_size(pictures[0], self.multiple) if pictures else (NATIVE_SIDE, NATIVE_SIDE)
        height, width = (
            side if asked is None else asked for asked, side in zip((params.height, params.width), native, strict=True)
        )
        return height, width


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all images of a request share."""

    size: Size
    conditions: Mapping[str, Condition]  # by branch
    source: SourceImage | None  # a picture that is drawn anew in part


class KleinPipeline(DiffusionModel):
    """Made by `KleinSpec.load`. keeps_references: whether references attend to nothing else, so that their keys and
    values are computed once per request.
    """

    output_port = "image"
    gives_modulated_input = True

    def __init__(
        self,
        transformer: Flux2Transformer,
        vae: Any,
        sampler_config: Mapping[str, Any],
        geometry: Geometry,
        preview_map: PreviewMap | None,
        keeps_references: bool,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.geometry = geometry
        self.keeps_references = keeps_references
        self.num_blocks = transformer.config.num_blocks
        self.token_bytes = transformer.config.dim * transformer.x_embedder.weight.element_size()
        self._sampler_config = sampler_config
        self._device = transformer.device
        self._autoencoder = Flux2Autoencoder(vae)
        self._previewer = Previewer(
            preview_map, self._autoencoder.decode_unfolded, geometry.vae_scale, transformer.device
        )

    def prepare(
        self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int, encoded: EncodedImages
    ) -> Prepared:
        texts = {POSITIVE: self._embed_text(inputs["prompt_embeds"], "prompt_embeds")}
        if is_guided(params):
            if NEGATIVE_PORT not in inputs:
                raise StageError(f"{NEGATIVE_PORT}: not given, but guidance_scale {guidance_scale(params):g} reads it")
            texts[NEGATIVE] = self._embed_text(inputs[NEGATIVE_PORT], NEGATIVE_PORT)
        pixels = [encoded.pixels(picture, "image") for picture in pictures_of(params)]
        size = self.geometry.size(params, [(picture.shape[0], picture.shape[1]) for picture in pixels])
        latents = self._encode(pixels, encoded, is_masked=params.mask is not None)
        source = None
        if params.mask is not None:
            mask = soft_mask(encoded.mask(params.mask, "mask"), size, (latents[0].shape[1], latents[0].shape[2]))
            source = SourceImage(size, latents[0], None, mask.to(self._device))
        references = tuple(self.transformer.embed_reference(one) for one in latents)
        return Prepared(size, self._conditions(texts, references), source)

    def trajectory(self, prepared: Prepared, params: DiffusionParams) -> KleinTrajectory:
        height, width = (side // self.geometry.multiple for side in prepared.size)
        config, steps = self.transformer.config, num_steps(params)
        sigmas = params.sigmas or even_sigmas(steps)
        return KleinTrajectory(
            latent_shape=(config.in_channels, height, width),
            sampler=fresh_sampler(
                self._sampler_config, sigmas, shift(height * width, steps), self._device, first_step(params)
            ),
            num_tokens=sum(height * width + self._num_tokens(row) for row in prepared.conditions.values()),
            conditions=prepared.conditions,
            params=params,
            scale=guidance_scale(params),
            start=first_step(params),
            source=prepared.source,
        )

    def adapted(self) -> Flux2Transformer:
        return self.transformer

    def embed(
        self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Condition]
    ) -> JointTokens:
        times = torch.tensor(timesteps, dtype=torch.float32, device=self._device)
        return self.transformer.embed(latents, times, conditions)

    def run_blocks(self, tokens: JointTokens, start: int, stop: int) -> JointTokens:
        return self.transformer.run_blocks(tokens, start, stop)

    def read_tokens(self, plain: Any, tensors: Sequence[Tensor]) -> JointTokens:
        return self.transformer.read_tokens(plain, tensors)

    def modulated_input(self, tokens: JointTokens) -> list[Tensor]:
        return self.transformer.modulated_input(tokens)

    def unembed(self, tokens: JointTokens) -> list[Tensor]:
        return [velocity.float() for velocity in self.transformer.unembed(tokens)]

    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        decoded = self.decode_pixels(latents)
        check_finite(decoded, "the pixels")
        yield to_pixels(decoded)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        return self._autoencoder.decode(latents)

    def preview(self, latents: Tensor) -> Tensor:
        return self._previewer(self._autoencoder.unfold(latents))

    def _embed_text(self, states: Tensor, port: str) -> Tensor:
        """[T, 3 layers' width] -> [T, D]"""
        if not len(states):
            raise InvalidRequestError(f"{port}: got no token, expected at least one")
        return self.transformer.embed_text(states.to(self._device))

    def _encode(self, pixels: Sequence[Tensor], encoded: EncodedImages, is_masked: bool) -> list[Tensor]:
        """Latents [C, h, w] float32 of each."""
        whole = [cropped(picture, self.geometry.multiple) for picture in pixels]
        if is_masked:
            whole[0] = stretched(pixels[0], self.geometry.multiple)
        return [encoded.of(picture, self._autoencoder.encode) for picture in whole]

    def _conditions(self, texts: Mapping[str, Tensor], references: tuple[Reference, ...]) -> dict[str, Condition]:
        if references and self.keeps_references:
            remembered = self.transformer.remember(references)
            return {branch: Condition(text, remembered=remembered) for branch, text in texts.items()}
        return {branch: Condition(text, references) for branch, text in texts.items()}

    def _num_tokens(self, condition: Condition) -> int:
        """Of a row, without the picture; keys and values that are held count as the activations that fill as much."""
        config = self.transformer.config
        held = 0 if condition.remembered is None else condition.remembered.numel()
        of_references = sum(len(reference.tokens) for reference in condition.references)
        return len(condition.text) + of_references + held // (config.activation_widths * config.dim)
