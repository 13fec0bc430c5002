"""Qwen-Image as a DiffusionModel: native transformer, diffusers' VAE. A request's texts and references, and how latents
become pixels and back; scaling as in diffusers' pipeline_qwenimage and pipeline_qwenimage_edit_plus.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.media.image_input import fitted
from vllm_omni.models.qwen_image.geometry import ImageGeometry
from vllm_omni.models.qwen_image.positions import MAX_POSITION, first_text_position
from vllm_omni.models.qwen_image.trajectory import (
    QwenImageTrajectory,
    guidance_scale,
    is_guided,
    num_steps,
    sigmas,
)
from vllm_omni.models.qwen_image.transformer import Context, QwenImageTransformer, grid_of
from vllm_omni.models.qwen_image.vae import PictureVae
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, check_finite
from vllm_omni.worker.diffusion.encoded_images import EncodedImages
from vllm_omni.worker.diffusion.flow_sampler import fresh_sampler, linear_shift
from vllm_omni.worker.diffusion.flow_trajectory import NEGATIVE, POSITIVE
from vllm_omni.worker.diffusion.joint import JointTokens
from vllm_omni.worker.diffusion.patches import PATCH
from vllm_omni.worker.diffusion.preview_map import PreviewMap
from vllm_omni.worker.diffusion.previewer import Previewer, to_pixels
from vllm_omni.worker.diffusion.source_image import SourceImage, first_step, latent_mask

PORTS = {POSITIVE: "prompt_embeds", NEGATIVE: "negative_prompt_embeds"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all images of a request share."""

    height: int  # in latents
    width: int
    contexts: Mapping[str, Context]  # by branch
    source: SourceImage | None  # that it starts from


class QwenImagePipeline(DiffusionModel):
    """Made by `QwenImageSpec.load`."""

    output_port = "image"
    gives_modulated_input = True

    def __init__(
        self,
        transformer: QwenImageTransformer,
        vae: PictureVae,
        sampler_config: Mapping[str, Any],
        geometry: ImageGeometry,
        preview_map: PreviewMap | None,
        edits: bool,
    ) -> None:
        """edits: whether the pictures of a request are edited; else what is made starts from the one that it brings."""
        self.transformer = transformer
        self.vae = vae
        self.geometry = geometry
        self.edits = edits
        self.num_blocks = len(transformer.blocks)
        self.token_bytes = transformer.config.dim * transformer.dtype.itemsize
        self._sampler_config = sampler_config
        self._device = transformer.device
        self._previewer = Previewer(preview_map, vae.decode, geometry.vae_scale, self._device)

    def prepare(
        self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int, encoded: EncodedImages
    ) -> Prepared:
        pictures = [encoded.pixels(source, name) for name, source in sources(params)]
        edited = pictures if self.edits else []
        size = self.geometry.size(params, self._given_size(pictures))
        height, width = (side // self.geometry.multiple * PATCH for side in size)
        latents = [self._encoded(pixels, encoded) for pixels in edited]
        grids = tuple(grid_of(reference) for reference in latents)
        references = self.transformer.encode_references(latents)
        most = MAX_POSITION - first_text_position(((height // PATCH, width // PATCH), *grids))
        contexts = {
            branch: Context(self._encode_text(inputs, PORTS[branch], most), references, grids)
            for branch in ((POSITIVE, NEGATIVE) if is_guided(params) else (POSITIVE,))
        }
        source = None if self.edits or not pictures else self._source(pictures[0], size, params, encoded)
        return Prepared(height, width, contexts, source)

    def trajectory(self, prepared: Prepared, params: DiffusionParams) -> QwenImageTrajectory:
        height, width = prepared.height, prepared.width
        num_picture = (height // PATCH) * (width // PATCH)
        shift = linear_shift(self._sampler_config, num_picture)
        start = 0 if prepared.source is None else first_step(params, num_steps(params))
        return QwenImageTrajectory(
            latent_shape=(self.transformer.config.out_channels, height, width),
            sampler=fresh_sampler(self._sampler_config, sigmas(params), shift, self._device, start),
            num_tokens=sum(
                num_picture + len(context.references) + len(context.text) for context in prepared.contexts.values()
            ),
            conditions=prepared.contexts,
            params=params,
            scale=guidance_scale(params),
            start=start,
            source=prepared.source,
        )

    def adapted(self) -> QwenImageTransformer:
        return self.transformer

    def embed(
        self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Context]
    ) -> JointTokens:
        levels = torch.tensor(timesteps, dtype=torch.float32, device=self._device)
        return self.transformer.embed(latents, levels, conditions)

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
        return self.vae.decode(latents)

    def preview(self, latents: Tensor) -> Tensor:
        return self._previewer(latents)

    def _given_size(self, pictures: Sequence[Tensor]) -> tuple[int, int] | None:
        """What the pictures of a request make of the size of what is made; None where it brings none."""
        if not pictures:
            return None
        size_of = self.geometry.edited_size if self.edits else self.geometry.source_size
        return size_of(*pictures[-1].shape[:2])

    def _encoded(self, pixels: Tensor, encoded: EncodedImages) -> Tensor:
        """uint8 [H, W, 3] of a picture to edit -> [C, h, w] float32, the likeliest latents: nothing is drawn."""
        size = self.geometry.edited_size(*pixels.shape[:2])
        return encoded.of(fitted(pixels, size), self.vae.encode)[0]

    def _source(
        self, pixels: Tensor, size: tuple[int, int], params: DiffusionParams, encoded: EncodedImages
    ) -> SourceImage:
        mean, deviation = encoded.of(fitted(pixels, size), self.vae.encode)
        mask = None
        if params.mask is not None:
            mask = latent_mask(encoded.mask(params.mask, "mask"), size, mean).to(self._device)
        return SourceImage(size, mean, deviation, mask)

    def _encode_text(self, inputs: Mapping[str, Any], port: str, most: int) -> Tensor:
        """The states [T, J] of one prompt -> [T, D]."""
        states = inputs.get(port)
        if states is None:
            raise StageError(f"{port}: not given, but this request's guidance reads it")
        if not 0 < len(states) <= most:
            raise InvalidRequestError(f"{port}: got {len(states)} tokens, expected 1 to {most}")
        return self.transformer.encode_text(states)


def sources(params: DiffusionParams) -> list[tuple[str, Any]]:
    """The pictures that a request brings, and what each is called."""
    if params.image is None:
        return []
    if isinstance(params.image, list | tuple):
        return [(f"image[{index}]", source) for index, source in enumerate(params.image)]
    return [("image", params.image)]
