"""The way of one FLUX.2 [klein] picture from noise to latents: timesteps, guidance, what a mask keeps.

Formulas are those of diffusers' pipeline_flux2_klein and pipeline_flux2_klein_inpaint.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vllm_omni.models.flux2.pictures import STRENGTH
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.flow_trajectory import FlowTrajectory

DEFAULT_STEPS, DEFAULT_GUIDANCE = 50, 4.0  # the published pipeline's own
LONG = 4300  # tokens of a picture from which on the shift does not depend on the number of steps
SLOPE_OF_10, BASE_OF_10 = 8.73809524e-05, 1.89833333  # of the shift by tokens, fitted for 10 steps
SLOPE_OF_200, BASE_OF_200 = 0.00016927, 0.45666666  # and for 200


class KleinTrajectory(FlowTrajectory):
    """Guidance is `negative + scale * (positive - negative)`, so 1 is neutral."""

    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        positive, negative = outputs
        return negative + self._scale * (positive - negative)


def num_steps(params: DiffusionParams) -> int:
    if params.sigmas is not None:
        return len(params.sigmas)
    return DEFAULT_STEPS if params.num_inference_steps is None else params.num_inference_steps


def first_step(params: DiffusionParams) -> int:
    """The first that is computed."""
    if params.mask is None:
        return 0
    steps, strength = num_steps(params), STRENGTH if params.strength is None else params.strength
    return int(max(steps - min(steps * strength, steps), 0))


def guidance_scale(params: DiffusionParams) -> float:
    return DEFAULT_GUIDANCE if params.guidance_scale is None else params.guidance_scale


def is_guided(params: DiffusionParams) -> bool:
    return guidance_scale(params) > 1


def shift(num_picture_tokens: int, num_steps: int) -> float:
    """Of the sampler's sigmas: linear in the tokens and, of pictures that are not large, in the steps."""
    of_200 = SLOPE_OF_200 * num_picture_tokens + BASE_OF_200
    if num_picture_tokens > LONG:
        return of_200
    slope = (of_200 - (SLOPE_OF_10 * num_picture_tokens + BASE_OF_10)) / 190
    return of_200 + slope * (num_steps - 200)
