"""Samplers of diffusers: one that is given what another keeps takes the same steps from there, to the bit."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.worker.diffusion.sampler_state import HISTORIES, restore_sampler, sampler_state

SHAPE = (4, 6, 5)
STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": {"solver_order": 3, "prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "DPMSolverMultistepScheduler": {"solver_order": 3, "prediction_type": "flow_prediction", "use_flow_sigmas": True},
}


def fresh(name: str) -> Any:
    sampler = getattr(diffusers, name)(**SETTINGS.get(name, {}))
    sampler.set_timesteps(STEPS)
    sampler.set_begin_index(0)
    return sampler


def step(sampler: Any, index: int, latents: Tensor) -> Tensor:
    """With an output that depends on all that a model's does."""
    timestep = sampler.timesteps[index]
    output = torch.sin(3 * latents + float(timestep))
    stepped: Tensor = sampler.step(output[None], timestep, latents[None], return_dict=False)[0][0]
    return stepped


@pytest.mark.parametrize("name", HISTORIES)
def test_a_sampler_goes_on_from_every_step_of_another(name: str) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    whole, states = noise, []
    sampler = fresh(name)
    num_steps = len(sampler.timesteps)
    for index in range(num_steps):
        states.append((whole, sampler_state(sampler)))
        whole = step(sampler, index, whole)
    for start, (latents, state) in enumerate(states):
        sampler = fresh(name)
        restore_sampler(sampler, state, SHAPE, num_steps)
        for index in range(start, num_steps):
            latents = step(sampler, index, latents)
        assert torch.equal(latents, whole), start


@pytest.mark.parametrize("name", [name for name in HISTORIES if name != "FlowMatchEulerDiscreteScheduler"])
def test_without_its_history_it_would_not(name: str) -> None:
    """The comparison above can fail."""
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    sampler = fresh(name)
    for index in range(3):
        latents = step(sampler, index, latents)
    other = fresh(name)
    other.set_begin_index(3)
    assert not torch.equal(step(sampler, 3, latents), step(other, 3, latents))


def test_nothing_that_a_step_writes_is_left_out() -> None:
    for name, history in HISTORIES.items():
        sampler, latents = fresh(name), torch.zeros(SHAPE)
        before = {key: repr(value) for key, value in vars(sampler).items()}
        changed: set[str] = set()
        for index in range(len(sampler.timesteps)):
            latents = step(sampler, index, latents)
            changed |= {key for key, value in vars(sampler).items() if repr(value) != before.get(key)}
        assert changed <= set(history), name


def test_a_sampler_that_is_not_known_is_refused_in_words() -> None:
    with pytest.raises(StageError, match="state of a DDIMScheduler cannot be saved"):
        sampler_state(diffusers.DDIMScheduler())


@pytest.mark.parametrize(
    "change",
    [
        {"_step_index": -1},
        {"_step_index": STEPS + 1},
        {"_step_index": True},
        {"_step_index": torch.zeros(1)},
        {"last_sample": torch.zeros(2, 2)},
        {"model_outputs": [torch.zeros(1, 4, 6, 6)]},
        {"model_outputs": "words"},
        {"timesteps": None},
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    sampler = fresh("UniPCMultistepScheduler")
    with pytest.raises(InvalidRequestError):
        restore_sampler(sampler, {**sampler_state(sampler), **change}, SHAPE, STEPS)
