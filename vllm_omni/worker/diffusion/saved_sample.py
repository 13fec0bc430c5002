"""One sample on its way, as plain values and tensors, and a fresh sample made what that one was: it then takes the
steps that are left, to the bit as if it had never been stopped. Reads no file; all that it is given may come from a
stranger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_omni.core.diffusion.caches.base import RowCache, StepCachePolicy
from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.checks import brief, check_number, did_you_mean
from vllm_omni.utils.kept import on_device
from vllm_omni.worker.diffusion.diffusion_runner import DiffusionState
from vllm_omni.worker.diffusion.tiling import MIN_TILE, OVERLAP

KEYS = frozenset({"step", "num_reused", "latents", "generator", "trajectory", "caches", "tile"})


def sample_content(state: DiffusionState, caches: Mapping[str, RowCache]) -> dict[str, Any]:
    """caches: the step caches of its branches, where the policy has any."""
    return {
        "step": state.step,
        "num_reused": state.num_reused,
        "latents": state.latents,
        "generator": state.generator.get_state(),
        "trajectory": dict(state.trajectory.state()),
        "caches": {branch: cache.state() for branch, cache in caches.items()},
        "tile": state.tile,
    }


def restore_sample(state: DiffusionState, content: object, policy: StepCachePolicy) -> None:
    """state: as it was begun, of the same request and output. InvalidRequestError, and a state of no further use, where
    the content does not fit it.
    """
    if not isinstance(content, Mapping) or content.keys() != KEYS:
        raise InvalidRequestError(f"a saved sample: got {brief(content)}, expected {', '.join(sorted(KEYS))}")
    step, device = content["step"], state.latents.device
    _check_count("step", step, state.num_steps)
    _check_count("num_reused", content["num_reused"], step * len(state.trajectory.conditions))
    state.latents = _latents(content["latents"], state.latents).to(device)
    _set_generator(state.generator, content["generator"])
    state.trajectory.restore(_mapping("trajectory", content["trajectory"], device))
    state.tile = _tile(content["tile"], state.tile)
    state.step, state.num_reused = step, content["num_reused"]
    for branch, kept in _mapping("caches", content["caches"], device).items():
        if branch not in state.trajectory.conditions or policy.computes_all:
            raise InvalidRequestError(
                f"caches: got the branch {branch!r}{did_you_mean(branch, state.trajectory.conditions)}"
            )
        row = policy.new_row(state.num_steps)
        row.restore(_mapping(f"caches.{branch}", kept, device))
        state.kept_caches[branch] = row


def _latents(saved: object, fresh: Tensor) -> Tensor:
    if not isinstance(saved, Tensor) or saved.shape != fresh.shape or saved.dtype != fresh.dtype:
        got = f"{saved.dtype} {list(saved.shape)}" if isinstance(saved, Tensor) else brief(saved)
        raise InvalidRequestError(f"latents: got {got}, expected {fresh.dtype} {list(fresh.shape)}")
    return saved


def _tile(saved: object, planned: int | None) -> int | None:
    """The saved one, where it takes no more memory than what is planned here."""
    if saved is None and planned is None:
        return None
    if type(saved) is not int or saved < MIN_TILE or saved % OVERLAP or (planned is not None and saved > planned):
        tiles = "whole" if planned is None else f"in tiles of at most {planned} latents"
        raise InvalidRequestError(
            f"tile: got {brief(saved)}, but such pictures are decoded {tiles} here; give the stage as much memory "
            "as it had (resources.max_memory_gb), and the same vae_tiling"
        )
    return saved


def _set_generator(generator: torch.Generator, saved: object) -> None:
    fresh = generator.get_state()
    if not isinstance(saved, Tensor) or saved.shape != fresh.shape or saved.dtype != fresh.dtype:
        raise InvalidRequestError(f"generator: got {brief(saved)}, expected the state of a random number generator")
    try:
        generator.set_state(saved)
    except RuntimeError as error:
        raise InvalidRequestError(f"generator: got a state that torch does not take ({error})") from error


def _check_count(name: str, value: object, most: int) -> None:
    check_number(name, value, 0, most, integer=True, raises=InvalidRequestError)


def _mapping(name: str, value: object, device: torch.device) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name}: got {brief(value)}, expected names and their values")
    moved: dict[str, Any] = on_device(value, device)
    return moved
