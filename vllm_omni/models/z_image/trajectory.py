"""The way of one Z-Image picture from noise to latents: timesteps, guidance and what a request's parameters mean.

Formulas (shift, guidance, normalisation, truncation) are those of diffusers' pipeline_z_image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.flow_sampler import even_sigmas
from vllm_omni.worker.diffusion.flow_trajectory import POSITIVE, FlowTrajectory

DEFAULT_STEPS = 50  # the published pipeline's own
DEFAULT_GUIDANCE = 5.0
NUM_TRAIN_TIMESTEPS = 1000


class ZImageTrajectory(FlowTrajectory):
    """Guidance adds `scale * (positive - negative)`, so 0 is neutral."""

    def __init__(self, *, params: DiffusionParams, **named: Any) -> None:
        """named: as of a FlowTrajectory."""
        super().__init__(params=params, **named)
        extra = params.extra or {}
        self._truncation = float(extra.get("cfg_truncation", 1.0))
        self._norm_limit = float(extra.get("cfg_normalization", 0.0))

    def branches(self, timestep: float) -> tuple[str, ...]:
        is_truncated = self._truncation <= 1 and cleanness(timestep) > self._truncation
        return (POSITIVE,) if is_truncated else super().branches(timestep)

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
