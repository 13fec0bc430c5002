"""The way of one Qwen-Image picture from noise to latents: timesteps, guidance and what a request's parameters mean.
Formulas are those of diffusers' pipeline_qwenimage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_omni.models.qwen_image.transformer import Context
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import Trajectory
from vllm_omni.worker.diffusion.flow_sampler import FlowSampler, even_sigmas
from vllm_omni.worker.diffusion.guidance import guided_timesteps
from vllm_omni.worker.diffusion.patches import patchified, unpatchified
from vllm_omni.worker.diffusion.previewer import flow_estimate
from vllm_omni.worker.diffusion.source_image import SourceImage, StartedImage

POSITIVE, NEGATIVE = "positive", "negative"
DEFAULT_STEPS = 50
DEFAULT_GUIDANCE = 4.0
NEUTRAL_GUIDANCE = 1.0


class QwenImageTrajectory(Trajectory):
    """The way of one image. Guidance at 1 is neutral."""

    sampler: FlowSampler

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        sampler: FlowSampler,
        num_tokens: int,
        contexts: Mapping[str, Context],
        params: DiffusionParams,
        start: int,
        source: SourceImage | None,
    ) -> None:
        self.latent_shape = latent_shape
        self.sampler = sampler
        self.num_tokens = num_tokens
        self.conditions = contexts
        self.start = start
        self._scale = guidance_scale(params)
        self._guided = guided_timesteps(sampler.timesteps, params)
        self._source = source
        self._started: StartedImage | None = None

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
        is_guided = NEGATIVE in self.conditions and timestep in self._guided
        return (POSITIVE, NEGATIVE) if is_guided else (POSITIVE,)

    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        return outputs[0] if len(outputs) == 1 else guided(outputs[0], outputs[1], self._scale)

    def estimate(self, latents: Tensor, output: Tensor, step: int) -> Tensor:
        return flow_estimate(self.sampler.sigmas, self.start + step, latents, output)


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Away from the negative [C, h, w], every patch being as long as that of the positive was."""
    patches = patchified(negative + scale * (positive - negative)[None], channels_first=True)
    length = torch.linalg.vector_norm(patchified(positive[None], channels_first=True), dim=-1, keepdim=True)
    patches = patches * (length / torch.linalg.vector_norm(patches, dim=-1, keepdim=True))
    return unpatchified(patches, positive.shape[1] // 2, positive.shape[2] // 2, channels_first=True)[0]


def is_guided(params: DiffusionParams) -> bool:
    """Whether the negative branch is computed."""
    return guidance_scale(params) > NEUTRAL_GUIDANCE


def guidance_scale(params: DiffusionParams) -> float:
    return DEFAULT_GUIDANCE if params.guidance_scale is None else params.guidance_scale


def num_steps(params: DiffusionParams) -> int:
    if params.sigmas is not None:
        return len(params.sigmas)
    return DEFAULT_STEPS if params.num_inference_steps is None else params.num_inference_steps


def sigmas(params: DiffusionParams) -> Sequence[float]:
    """Of each step, before the sampler shifts them."""
    return even_sigmas(num_steps(params)) if params.sigmas is None else params.sigmas
