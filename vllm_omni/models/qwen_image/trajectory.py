"""The way of one Qwen-Image picture from noise to latents: timesteps, guidance and what a request's parameters mean.
Formulas are those of diffusers' pipeline_qwenimage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.flow_sampler import even_sigmas
from vllm_omni.worker.diffusion.flow_trajectory import FlowTrajectory
from vllm_omni.worker.diffusion.patches import patchified, unpatchified

DEFAULT_STEPS = 50
DEFAULT_GUIDANCE = 4.0
NEUTRAL_GUIDANCE = 1.0


class QwenImageTrajectory(FlowTrajectory):
    """Guidance at 1 is neutral."""

    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        return outputs[0] if len(outputs) == 1 else guided(outputs[0], outputs[1], self._scale)


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
