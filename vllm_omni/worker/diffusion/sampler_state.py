"""What a sampler of diffusers keeps from one step to the next, besides its schedule: taken from one, and put into a
fresh one of the same schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.utils.checks import brief
from vllm_omni.utils.kept import put_kept, take_kept

# class of diffusers -> all attributes that its `step` writes
HISTORIES: Mapping[str, tuple[str, ...]] = {
    "FlowMatchEulerDiscreteScheduler": ("_step_index",),
    "FlowMatchHeunDiscreteScheduler": ("_step_index", "prev_derivative", "dt", "sample"),
    "DPMSolverMultistepScheduler": ("_step_index", "model_outputs", "lower_order_nums"),
    "UniPCMultistepScheduler": (
        "_step_index",
        "model_outputs",
        "timestep_list",
        "lower_order_nums",
        "last_sample",
        "this_order",
    ),
}


def sampler_state(sampler: object) -> dict[str, Any]:
    """StageError for a sampler of which it is not known what it keeps."""
    names = _history(sampler)
    made = [name for name in names if name in vars(sampler)]  # some are made by the first step
    return {**dict.fromkeys(names), **take_kept(sampler, made)}


def restore_sampler(sampler: object, state: Mapping[str, Any], latent_shape: tuple[int, ...], num_steps: int) -> None:
    """InvalidRequestError for a state that is none of such a sampler."""
    for name, value in state.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor) and item.numel() != 1 and item.shape != (1, *latent_shape):
                raise InvalidRequestError(
                    f"the sampler's {brief(name)}: got {list(item.shape)}, expected {[1, *latent_shape]}"
                )
    index = state.get("_step_index")
    if index is not None and (type(index) is not int or not 0 <= index <= num_steps):
        raise InvalidRequestError(f"the sampler's step: got {brief(index)}, expected 0 to {num_steps}")
    put_kept(sampler, _history(sampler), state)


def _history(sampler: object) -> tuple[str, ...]:
    name = type(sampler).__name__
    if name not in HISTORIES:
        known = ", ".join(HISTORIES)
        raise StageError(f"the state of a {name} cannot be saved; expected one of {known}")
    return HISTORIES[name]
