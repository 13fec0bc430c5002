"""The way of one video from noise to latents: guidance, a first frame that is given, and what a request's parameters
mean. Formulas are those of diffusers' pipeline_wan and pipeline_wan_i2v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.flow_trajectory import FlowTrajectory

DEFAULT_STEPS = 50
DEFAULT_GUIDANCE = 5.0
NEUTRAL_GUIDANCE = 1.0
SHIFT = "shift"  # of the request's extra keys


class WanTrajectory(FlowTrajectory):
    """Guidance at 1 is neutral. first_frame: [C, h, w], None where it is made, too."""

    def __init__(self, *, first_frame: Tensor | None, **whole: Any) -> None:
        super().__init__(**whole)
        self._first_frame = first_frame

    def noise(self, generator: torch.Generator) -> Tensor:
        return self._with_first_frame(super().noise(generator))

    def constrain(self, latents: Tensor, step: int) -> Tensor:
        return self._with_first_frame(latents)

    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        positive, negative = outputs
        return negative + self._scale * (positive - negative)

    def _with_first_frame(self, latents: Tensor) -> Tensor:
        if self._first_frame is None:
            return latents
        first = self._first_frame[:, None].to(latents.device)
        return torch.cat([first, latents[:, 1:]], dim=1)


def is_guided(params: DiffusionParams) -> bool:
    """Whether the negative branch is computed."""
    return guidance_scale(params) > NEUTRAL_GUIDANCE


def guidance_scale(params: DiffusionParams) -> float:
    return DEFAULT_GUIDANCE if params.guidance_scale is None else params.guidance_scale


def num_steps(params: DiffusionParams) -> int:
    return DEFAULT_STEPS if params.num_inference_steps is None else params.num_inference_steps


def shift_of(params: DiffusionParams) -> float | None:
    """Of the sampler's sigmas; None: the checkpoint's."""
    return (params.extra or {}).get(SHIFT)
