"""diffusers' samplers of Wan: a published configuration checked, and a fresh sampler for each output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.diffusion.flow_sampler import MAX_TIMESTEPS, FlowSampler

UNIPC, EULER = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
SHIFTS = {UNIPC: "flow_shift", EULER: "shift"}  # what each calls the shift of its sigmas
# What each must say to follow a flow without a shift that depends on the size.
EXPECTED: Mapping[str, Mapping[str, Any]] = {
    UNIPC: {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    EULER: {"use_dynamic_shifting": False},
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    UNIPC: {"prediction_type": "epsilon", "use_flow_sigmas": False},
    EULER: {"use_dynamic_shifting": False},
}
MAX_SHIFT = 100.0


def read_sampler(folder: Path) -> dict[str, Any]:
    """A pipeline's `scheduler/scheduler_config.json`; ConfigError for another sampler, and for one of other models."""
    config, where = read_json(folder / "scheduler_config.json"), f"{folder}/scheduler_config.json"
    name = config.get("_class_name")
    if name not in SHIFTS:
        raise ConfigError(f"{where}: _class_name: got {brief(name)}, expected one of {', '.join(SHIFTS)}")
    for key, value in EXPECTED[name].items():
        got = config.get(key, DEFAULTS[name][key])
        if got != value:
            raise ConfigError(f"{where}: {key}: got {brief(got)}, expected {value!r}")
    if config.get(SHIFTS[name]) is not None:
        check_number(f"{where}: {SHIFTS[name]}", config[SHIFTS[name]], 0, MAX_SHIFT, above_low=True, raises=ConfigError)
    if config.get("num_train_timesteps") is not None:
        count = config["num_train_timesteps"]
        check_number(f"{where}: num_train_timesteps", count, 1, MAX_TIMESTEPS, integer=True, raises=ConfigError)
    return config


def fresh_sampler(config: Mapping[str, Any], num_steps: int, shift: float | None, device: torch.device) -> FlowSampler:
    """config: what `read_sampler` gave. shift: of the sigmas, in place of the configured one."""
    import diffusers

    name = config["_class_name"]
    kind = getattr(diffusers, name)
    sampler = kind.from_config(dict(config) if shift is None else {**config, SHIFTS[name]: shift})
    sampler.set_timesteps(num_steps, device=device)
    sampler.set_begin_index(0)
    return cast(FlowSampler, sampler)
