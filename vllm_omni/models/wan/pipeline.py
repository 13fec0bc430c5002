"""Wan as a DiffusionModel: native transformer, diffusers' VAE and samplers. A request's texts and first frame, and how
latents become frames; as in diffusers' pipeline_wan and pipeline_wan_i2v.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.media.image_input import fitted
from vllm_omni.models.wan.films import Films
from vllm_omni.models.wan.geometry import VideoGeometry
from vllm_omni.models.wan.sampler import fresh_sampler
from vllm_omni.models.wan.trajectory import WanTrajectory, guidance_scale, is_guided, num_steps, shift_of
from vllm_omni.models.wan.transformer import MAX_TEXT, Condition, WanTransformer
from vllm_omni.models.wan.vae import FilmVae
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel
from vllm_omni.worker.diffusion.encoded_images import EncodedImages
from vllm_omni.worker.diffusion.flow_trajectory import NEGATIVE, POSITIVE
from vllm_omni.worker.diffusion.preview_map import PreviewMap
from vllm_omni.worker.diffusion.previewer import Previewer

PORTS = {POSITIVE: "prompt_embeds", NEGATIVE: "negative_prompt_embeds"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all videos of a request share."""

    latent_size: tuple[int, int, int]  # frames, rows, columns
    conditions: Mapping[str, Condition]  # by branch
    first_frame: Tensor | None  # [C, h, w] float32


class WanPipeline(DiffusionModel):
    """Made by `WanSpec.load`."""

    output_port = "video"
    gives_modulated_input = True

    def __init__(
        self,
        transformer: WanTransformer,
        vae: FilmVae,
        sampler_config: Mapping[str, Any],
        geometry: VideoGeometry,
        preview_map: PreviewMap | None,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.geometry = geometry
        self.num_blocks = len(transformer.blocks)
        self.token_bytes = transformer.config.dim * transformer.dtype.itemsize
        self._sampler_config = sampler_config
        self._device = transformer.device
        self._previewer = Previewer(preview_map, vae.decode_frame, geometry.scale, self._device)

    def prepare(
        self, inputs: Mapping[str, Any], params: DiffusionParams, seed: int, encoded: EncodedImages
    ) -> Prepared:
        picture = None if params.image is None else encoded.pixels(params.image, "image")
        size = self.geometry.size(params, None if picture is None else (picture.shape[0], picture.shape[1]))
        first_frame = None if picture is None else encoded.of(fitted(picture, size), self.vae.encode)
        conditions = {
            branch: Condition(self.transformer.encode_text(_states(inputs, PORTS[branch])), picture is not None)
            for branch in ((POSITIVE, NEGATIVE) if is_guided(params) else (POSITIVE,))
        }
        return Prepared(self.geometry.latent_size(params, size), conditions, first_frame)

    def trajectory(self, prepared: Prepared, params: DiffusionParams) -> WanTrajectory:
        length = self.transformer.geometry(prepared.latent_size, False).length
        return WanTrajectory(
            latent_shape=(self.transformer.config.in_channels, *prepared.latent_size),
            sampler=fresh_sampler(self._sampler_config, num_steps(params), shift_of(params), self._device),
            num_tokens=length * len(prepared.conditions),
            conditions=prepared.conditions,
            params=params,
            scale=guidance_scale(params),
            first_frame=prepared.first_frame,
        )

    def adapted(self) -> WanTransformer:
        return self.transformer

    def embed(self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Condition]) -> Films:
        levels = torch.tensor(timesteps, dtype=torch.float32, device=self._device)
        return self.transformer.embed(latents, levels, conditions)

    def run_blocks(self, tokens: Films, start: int, stop: int) -> Films:
        return self.transformer.run_blocks(tokens, start, stop)

    def modulated_input(self, tokens: Films) -> list[Tensor]:
        return self.transformer.modulated_input(tokens)

    def unembed(self, tokens: Films) -> list[Tensor]:
        return [velocity.float() for velocity in self.transformer.unembed(tokens)]

    def num_pieces(self, latents: Tensor, kept: slice) -> int:
        """One for each frame of latents."""
        return latents.shape[1]

    def decode(self, latents: Tensor, kept: slice) -> Iterator[Tensor]:
        return self.vae.decode(latents)

    def assemble(self, pieces: Sequence[Tensor], params: DiffusionParams) -> Tensor:
        """uint8 [n, H, W, 3]."""
        return torch.cat(list(pieces))

    def preview(self, latents: Tensor) -> Tensor:
        """Of the frame in the middle."""
        return self._previewer(latents[:, latents.shape[1] // 2])

    def meta(self, params: DiffusionParams) -> Mapping[str, Any]:
        return {"fps": self.geometry.fps(params)}


def _states(inputs: Mapping[str, Any], port: str) -> Tensor:
    """[t, J] of one prompt."""
    states: Tensor | None = inputs.get(port)
    if states is None:
        raise StageError(f"{port}: not given, but this request's guidance reads it")
    if not 0 < len(states) <= MAX_TEXT:
        raise InvalidRequestError(f"{port}: got {len(states)} tokens, expected 1 to {MAX_TEXT}")
    return states
