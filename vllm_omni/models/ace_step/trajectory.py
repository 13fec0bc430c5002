"""The way of one piece of audio from noise to latents: which branches act, how guidance joins them, the noise schedule.

Formulas are those of diffusers' pipeline_ace_step; adaptive projected guidance is arXiv 2410.02416.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.models.ace_step.frames import RowCondition
from vllm_omni.utils.checks import brief
from vllm_omni.worker.diffusion.diffusion_model import Sampler, Trajectory

MAIN, NULL, PLAIN = "main", "null", "plain"
SAMPLER_CLASS = "FlowMatchEulerDiscreteScheduler"
SAMPLER_SETTINGS = {"num_train_timesteps": 1, "use_dynamic_shifting": False, "stochastic_sampling": False}
SAMPLER_DEFAULTS = {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "stochastic_sampling": False}


class ProjectedGuidance:
    """Adaptive projected guidance over the frames of each channel; its momentum belongs to one trajectory."""

    momentum = -0.75
    max_norm = 2.5

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self.average: Tensor | None = None  # [T, C], of the differences so far

    def __call__(self, main: Tensor, null: Tensor) -> Tensor:
        """[T, C] each -> main + (scale - 1) times the part of the (averaged, shortened) difference that is orthogonal
        to main.
        """
        difference = main - null
        self.average = difference if self.average is None else difference + self.momentum * self.average
        norm = torch.linalg.vector_norm(self.average, dim=0, keepdim=True)
        shortened = self.average * (self.max_norm / norm).clamp(max=1.0)
        direction = F.normalize(main, dim=0)
        orthogonal = shortened - (shortened * direction).sum(dim=0, keepdim=True) * direction
        return main + (self._scale - 1) * orthogonal


class AceStepTrajectory(Trajectory):
    """Branches: the prompt's, the null condition's while guidance acts, and for a cover of strength below 1 the one
    that does not know of the cover. interval: guidance acts while 1 - timestep is within it, at timesteps that are
    `guided`.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int],
        sampler: Sampler,
        conditions: Mapping[str, RowCondition],
        guidance_scale: float,
        interval: tuple[float, float],
        guided: Set[float],
        cover_strength: float,
    ) -> None:
        self.latent_shape = latent_shape
        self.sampler = sampler
        self.conditions = conditions
        self.num_tokens = sum(len(condition.context) for condition in conditions.values())
        self._guidance = ProjectedGuidance(guidance_scale)
        self._interval = interval
        self._guided = guided
        self._cover_strength = cover_strength

    def branches(self, timestep: float) -> tuple[str, ...]:
        start, end = self._interval
        is_guided = NULL in self.conditions and start <= 1.0 - timestep <= end and timestep in self._guided
        return tuple(name for name in (MAIN, NULL, PLAIN) if name in self.conditions and (name != NULL or is_guided))

    def state(self) -> Mapping[str, Any]:
        return {**super().state(), "average": self._guidance.average}

    def restore(self, state: Mapping[str, Any]) -> None:
        average = state.get("average")
        if average is not None and (not isinstance(average, Tensor) or average.shape != self.latent_shape):
            raise InvalidRequestError(f"average: got {brief(average)}, expected a tensor {list(self.latent_shape)}")
        super().restore({name: value for name, value in state.items() if name != "average"})
        self._guidance.average = average

    def combine(self, outputs: Sequence[Tensor], timestep: float) -> Tensor:
        found = dict(zip(self.branches(timestep), outputs, strict=True))
        velocity = found[MAIN]
        if NULL in found:
            velocity = self._guidance(velocity, found[NULL])
        if PLAIN in found:
            velocity = self._cover_strength * velocity + (1.0 - self._cover_strength) * found[PLAIN]
        return velocity


def check_sampler(config: Mapping[str, Any], where: str) -> None:
    """ConfigError for a sampler that the pipeline's own schedule does not fit."""
    if config.get("_class_name") != SAMPLER_CLASS:
        raise ConfigError(f"{where}: got {config.get('_class_name')!r}, expected {SAMPLER_CLASS}")
    for key, value in SAMPLER_SETTINGS.items():
        got = config.get(key, SAMPLER_DEFAULTS[key])
        if got != value:
            raise ConfigError(f"{where}: {key}: got {got!r}, expected {value!r}")


def fresh_sampler(
    config: Mapping[str, Any], num_steps: int, shift: float, sigmas: Sequence[float] | None, device: torch.device
) -> Sampler:
    """Noise levels from 1 towards 0 in equal steps, shifted; or as given."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    sampler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    if sigmas is None:
        levels = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float32)
        sigmas = (shift * levels / (1 + (shift - 1) * levels))[:-1].tolist()
    sampler.set_timesteps(sigmas=list(sigmas), device=device)
    sampler.set_begin_index(0)
    return cast(Sampler, sampler)
