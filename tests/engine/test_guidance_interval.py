"""Guidance that acts in a part of the steps: which those are, what runs outside of them, who refuses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.dit import BOTH, engine, random_pipeline, run, spec, task
from torch import Tensor

from vllm_omni.errors import InvalidRequestError
from vllm_omni.messages import StageDone
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.guidance import guided_timesteps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z-image")
    random_pipeline(path)
    return path


def params(steps: int, interval: Sequence[float] | None = None, **rest: Any) -> DiffusionParams:
    given = {"guidance_scale": 3.0, "seed": 1, **rest}
    return DiffusionParams(num_inference_steps=steps, guidance_interval=interval, **given)


def latents(folder: Path, value: DiffusionParams, **options: Any) -> tuple[Tensor, list[int]]:
    """(the final latents, how many rows each step computed)"""
    stage, rows = engine(folder, **options), []
    embed = stage.model.embed

    def counted(*arguments: Any) -> Any:
        rows.append(len(arguments[0]))
        return embed(*arguments)

    stage.model.embed = counted  # type: ignore[method-assign]
    stage.submit(task("x", value))
    event = run(stage)["x"]
    assert isinstance(event, StageDone), event
    return event.payload.tensors["latents"], rows


@pytest.mark.parametrize(
    "interval, rows",
    [
        ([0.0, 0.5], [2, 2, 2, 1, 1, 1]),
        ([0.5, 1.0], [1, 1, 1, 2, 2, 2]),
        ((0.34, 0.66), [1, 1, 2, 2, 1, 1]),
        ([0.0, 1.0], [2] * 6),
        (None, [2] * 6),
    ],
)
def test_outside_of_the_interval_one_branch_runs(
    folder: Path, interval: Sequence[float] | None, rows: list[int]
) -> None:
    assert latents(folder, params(6, interval))[1] == rows


def test_the_whole_interval_is_none_and_a_part_is_what_truncation_does(folder: Path) -> None:
    """cfg_truncation, whose pictures equal the reference's, ends guidance at a noise level."""
    whole, _ = latents(folder, params(6))
    assert torch.equal(latents(folder, params(6, [0, 1]))[0], whole)
    truncated, rows = latents(folder, params(6, extra={"cfg_truncation": 0.3}))
    num_guided = rows.count(2)
    assert 0 < num_guided < 6
    part, _ = latents(folder, params(6, [0, num_guided / 6]))
    assert torch.equal(part, truncated) and not torch.equal(part, whole)


@pytest.mark.parametrize("policy", ["taylorseer", "first_block"])
def test_a_branch_that_begins_late_is_computed_before_it_is_replayed(folder: Path, policy: str) -> None:
    cache = {"policy": policy} if policy == "taylorseer" else {"policy": policy, "threshold": 100.0}
    _, rows = latents(folder, params(12, [0.5, 1.0]), cache=cache)
    assert rows == [1] * 6 + [2] * 6


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_neighbouring_intervals_share_the_steps_between_them(count: int, a: float, b: float, c: float) -> None:
    first, middle, last = sorted((a, b, c))
    timesteps = torch.linspace(1000, 1, count)

    def guided(start: float, end: float) -> frozenset[float]:
        value = None if start >= end else DiffusionParams(guidance_interval=[start, end])
        return frozenset() if value is None else guided_timesteps(timesteps, value)

    left, right = guided(first, middle), guided(middle, last)
    assert not left & right and left | right == guided(first, last)
    assert guided(0.0, 1.0) == set(timesteps.tolist())


@pytest.mark.parametrize(
    "bad", [[0.5], [0.1, 0.2, 0.3], [0.5, 0.5], [0.6, 0.4], [-0.1, 1], [0, 1.1], [0, float("nan")], 1]
)
def test_an_interval_that_is_none_never_makes_params(bad: Any) -> None:
    with pytest.raises(InvalidRequestError, match="guidance_interval"):
        DiffusionParams(guidance_interval=bad)


def test_an_interval_without_a_step_is_refused(folder: Path) -> None:
    stage, value = spec(folder), params(4, [0.5, 0.55])
    with pytest.raises(
        InvalidRequestError, match=r"guidance_interval: got \[0\.5, 0\.55\], which holds none of 4 steps"
    ):
        stage.check(task("x", value).request, value, BOTH)
