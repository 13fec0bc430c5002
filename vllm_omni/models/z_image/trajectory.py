"""The way of one Z-Image picture from noise to latents: timesteps, guidance and what a request's parameters mean.

Formulas (shift, guidance, normalisation, truncation) are those of diffusers' pipeline_z_image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import Trajectory
from vllm_omni.worker.diffusion.flow_sampler import FlowSampler, even_sigmas
from vllm_omni.worker.diffusion.guidance import guided_timesteps
from vllm_omni.worker.diffusion.previewer import flow_estimate
from vllm_omni.worker.diffusion.source_image import SourceImage, StartedImage, first_step

POSITIVE, NEGATIVE = "positive", "negative"
DEFAULT_STEPS = 50  # the published pipeline's own
DEFAULT_GUIDANCE = 5.0
NUM_TRAIN_TIMESTEPS = 1000


class ZImageTrajectory(Trajectory):
    """The way of one image. Guidance adds `scale * (positive - negative)`, so 0 is neutral."""

    sampler: FlowSampler

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        sampler: FlowSampler,
        num_tokens: int,
        texts: Mapping[str, Tensor],
        params: DiffusionParams,
        source: SourceImage | None,
    ) -> None:
        self.latent_shape = latent_shape
        self.sampler = sampler
        self.start = first_step(params, num_steps(params))
        self._source = source
        self._started: StartedImage | None = None
        self.num_tokens = num_tokens
        self.conditions = texts
        extra = params.extra or {}
        self._scale = guidance_scale(params)
        self._guided = guided_timesteps(sampler.timesteps, params)
        self._truncation = float(extra.get("cfg_truncation", 1.0))
        self._norm_limit = float(extra.get("cfg_normalization", 0.0))

    def noise(self, generator: torch.Generator) -> Tensor:
        if self._source is None:
            return super().noise(generator)
        self._started = self._source.begin(generator)
        return self._started.at(self.sampler.sigmas[self.start])

    def constrain(self, latents: Tensor, step: int) -> Tensor:
        if self._started is None:
            return latents
        return self._started.constrain(latents, self.sampler.sigmas[self.start + step + 1])

    def branches(self, timestep: float) -> tuple[str, ...]:
        is_truncated = self._truncation <= 1 and cleanness(timestep) > self._truncation
        is_guided = self._scale > 0 and timestep in self._guided and not is_truncated
        return (POSITIVE, NEGATIVE) if is_guided else (POSITIVE,)

    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        positive, negative = outputs
        guided = positive + self._scale * (positive - negative)
        if self._norm_limit > 0:
            most = torch.linalg.vector_norm(positive) * self._norm_limit
            norm = torch.linalg.vector_norm(guided)
            guided = torch.where(norm > most, guided * (most / norm), guided)
        return guided

    def estimate(self, latents: Tensor, output: Tensor, step: int) -> Tensor:
        return flow_estimate(self.sampler.sigmas, self.start + step, latents, output)


def num_steps(params: DiffusionParams) -> int:
    if params.sigmas is not None:
        return len(params.sigmas)
    return DEFAULT_STEPS if params.num_inference_steps is None else params.num_inference_steps


def guidance_scale(params: DiffusionParams) -> float:
    return DEFAULT_GUIDANCE if params.guidance_scale is None else params.guidance_scale


def cleanness(timestep: float) -> float:
    """Timestep of the sampler (1000 is pure noise) -> time of the transformer (1 is clean)."""
    return (NUM_TRAIN_TIMESTEPS - timestep) / NUM_TRAIN_TIMESTEPS


def sigmas(params: DiffusionParams) -> Sequence[float]:
    """Of each step, before the sampler shifts them."""
    return even_sigmas(num_steps(params)) if params.sigmas is None else params.sigmas
