"""In which steps of a trajectory guidance acts, for every model that has it. Knows no formula of guidance."""

from __future__ import annotations

from torch import Tensor

from vllm_omni.errors import InvalidRequestError
from vllm_omni.params import DiffusionParams


def guided_timesteps(timesteps: Tensor, params: DiffusionParams) -> frozenset[float]:
    """Those of the sampler's timesteps [steps] at which `params.guidance_interval` lets guidance act: all without one.

    Of n steps these are number round(start * n) up to, and without, round(end * n), counted from 0.
    """
    start, end = params.guidance_interval or (0.0, 1.0)
    count = len(timesteps)
    return frozenset(timesteps[_place(start, count) : _place(end, count)].tolist())


def check_guidance_interval(params: DiffusionParams, num_steps: int) -> None:
    """InvalidRequestError for an interval that holds no step: then guidance itself is what should be turned off."""
    if params.guidance_interval is None:
        return
    start, end = params.guidance_interval
    if _place(start, num_steps) >= _place(end, num_steps):
        raise InvalidRequestError(
            f"guidance_interval: got [{start:g}, {end:g}], which holds none of {num_steps} steps;"
            " widen it, or turn guidance off with guidance_scale"
        )


def _place(share: float, count: int) -> int:
    """Half a step is rounded up."""
    return int(share * count + 0.5)
