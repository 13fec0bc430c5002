"""diffusers' Euler sampler for models that are trained by flow matching: its published configuration checked, and a
fresh one for each output, its sigmas shifted by how many tokens a picture has. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.diffusion_model import Sampler

SAMPLER_CLASS = "FlowMatchEulerDiscreteScheduler"
MAX_TIMESTEPS = 1_000_000  # the sampler makes a table of them


class FlowSampler(Sampler, Protocol):
    """A sampler whose model output is the change of the latents per sigma."""

    sigmas: Tensor  # of every step, and of the end


def read_flow_sampler(folder: Path) -> dict[str, Any]:
    """A pipeline's `scheduler/scheduler_config.json`; ConfigError for another sampler, and for numbers that no request
    could be computed with.
    """
    config, where = read_json(folder / "scheduler_config.json"), f"{folder}/scheduler_config.json"
    if config.get("_class_name") != SAMPLER_CLASS:
        raise ConfigError(f"{where}: _class_name: got {brief(config.get('_class_name'))}, expected {SAMPLER_CLASS}")
    for key in ("shift", "base_shift", "max_shift", "shift_terminal"):
        if config.get(key) is not None:
            check_number(f"{where}: {key}", config[key], raises=ConfigError)
    for key in ("num_train_timesteps", "base_image_seq_len", "max_image_seq_len"):
        if config.get(key) is not None:
            check_number(f"{where}: {key}", config[key], 1, MAX_TIMESTEPS, integer=True, raises=ConfigError)
    base, most = _lengths(config)
    if most <= base:
        raise ConfigError(f"{where}: max_image_seq_len: got {most}, expected more than base_image_seq_len, {base}")
    return config


def fresh_sampler(
    config: Mapping[str, Any], sigmas: Sequence[float], shift: float, device: torch.device, start: int = 0
) -> FlowSampler:
    """config: what `read_flow_sampler` gave. sigmas: before they are shifted, one per step. shift: read by a sampler
    with dynamic shifting alone. start: the first step that will be computed.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    sampler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    sampler.set_timesteps(sigmas=list(sigmas), device=device, mu=shift)
    sampler.set_begin_index(start)
    return cast(FlowSampler, sampler)


def even_sigmas(num_steps: int) -> list[float]:
    """From 1 down to 1 / num_steps."""
    return torch.linspace(1.0, 1 / num_steps, num_steps).tolist()


def linear_shift(config: Mapping[str, Any], num_tokens: int) -> float:
    """Of a sampler with dynamic shifting, for a picture of so many tokens."""
    base, most = _lengths(config)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(base_shift + (max_shift - base_shift) / (most - base) * (num_tokens - base))


def _lengths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of a picture that is shifted by `base_shift`, and of one that is shifted by `max_shift`."""
    return config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
