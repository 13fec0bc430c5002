"""The way of a picture or a video along a flow, as several families have it: from noise, or from a picture and within a
mask, with a negative branch in the steps in which guidance acts. How guidance combines the branches is the family's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import Trajectory
from vllm_omni.worker.diffusion.flow_sampler import FlowSampler
from vllm_omni.worker.diffusion.guidance import guided_timesteps
from vllm_omni.worker.diffusion.previewer import flow_estimate
from vllm_omni.worker.diffusion.source_image import SourceImage, StartedImage

POSITIVE, NEGATIVE = "positive", "negative"  # branches


class FlowTrajectory(Trajectory):
    """conditions: by branch, the negative one only where guidance acts at all. scale: of guidance, for the family's
    formula. start: the first of the sampler's steps that is computed. source: the picture that it starts from.
    """

    sampler: FlowSampler

    def __init__(
        self,
        *,
        latent_shape: tuple[int, ...],
        sampler: FlowSampler,
        num_tokens: int,
        conditions: Mapping[str, Any],
        params: DiffusionParams,
        scale: float,
        start: int = 0,
        source: SourceImage | None = None,
    ) -> None:
        self.latent_shape = latent_shape
        self.sampler = sampler
        self.num_tokens = num_tokens
        self.conditions = conditions
        self.start = start
        self._scale = scale
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

    def estimate(self, latents: Tensor, output: Tensor, step: int) -> Tensor:
        return flow_estimate(self.sampler.sigmas, self.start + step, latents, output)
