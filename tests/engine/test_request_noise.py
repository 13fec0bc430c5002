"""What a sampler draws while it goes comes from its request's generator; a result that is not finite is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.dit import engine, pictures, random_pipeline, run, task

from vllm_omni.errors import StageError
from vllm_omni.messages import StageFailed
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.request_noise import RequestNoise


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stochastic")
    random_pipeline(path)
    FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True).save_pretrained(path / "scheduler")
    return path


def params(seed: int, **rest: int) -> DiffusionParams:
    return DiffusionParams(seed=seed, num_inference_steps=4, guidance_scale=0.0, **rest)


def test_a_stochastic_sampler_gives_a_seed_the_same_picture_alone_and_in_a_crowd(stochastic: Path) -> None:
    alone = engine(stochastic)
    alone.submit(task("x", params(7)))
    expected = pictures(run(alone))["x"]
    crowd = engine(stochastic)
    torch.manual_seed(99)
    for key, value in {"a": params(1), "x": params(7), "b": params(7, num_outputs=2)}.items():
        crowd.submit(task(key, value))
    got = pictures(run(crowd))
    assert (got["x"].int() - expected.int()).abs().max() <= 1
    assert (got["b"][0].int() - expected[0].int()).abs().max() <= 1, "output 0 is the seed's"
    assert (got["a"].int() - expected.int()).abs().max() > 20


def test_nobody_elses_random_numbers_change(stochastic: Path) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    stage = engine(stochastic)
    torch.manual_seed(5)
    stage.submit(task("x", params(7)))
    run(stage)
    assert torch.equal(torch.randn(3), expected)


def test_every_way_to_draw_takes_the_requests_generator() -> None:
    ways = [
        lambda: torch.randn(2, 3),
        lambda: torch.randn((2, 3), dtype=torch.float64),
        lambda: torch.randn(size=(2, 3), device="cpu"),
        lambda: torch.rand(2),
        lambda: torch.randn_like(torch.zeros(2, dtype=torch.bfloat16)),
        lambda: torch.rand_like(torch.zeros(2, 2)),
        lambda: torch.randint(0, 100, (5,)),
        lambda: torch.randint(100, [5]),
        lambda: torch.randperm(9),
        lambda: torch.multinomial(torch.ones(50), 4),
    ]
    for index, draw in enumerate(ways):
        with RequestNoise([generator(1)]):
            first = draw()
        torch.manual_seed(index)
        with RequestNoise([generator(1)]):
            again, later = draw(), draw()
        assert torch.equal(first, again) and not torch.equal(again, later), index
        assert first.dtype == draw().dtype and first.shape == draw().shape


def test_rows_of_several_outputs_are_drawn_from_one_generator_each() -> None:
    with RequestNoise([generator(1), generator(2)]):
        rows = torch.randn_like(torch.zeros(2, 4))
    assert torch.equal(rows, torch.cat([torch.randn(1, 4, generator=generator(seed)) for seed in (1, 2)]))


def test_a_call_that_names_its_generator_keeps_it() -> None:
    with RequestNoise([generator(1)]):
        own = torch.randn(3, generator=generator(5))
    assert torch.equal(own, torch.randn(3, generator=generator(5)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_picture_that_is_not_finite_fails_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: float
) -> None:
    random_pipeline(tmp_path)
    stage = engine(tmp_path)
    model = stage.model
    kind = type(model.vae if part == "vae" else model.transformer)  # type: ignore[attr-defined]
    name = "decode" if part == "vae" else "unembed"
    whole, calls = getattr(kind, name), []

    def damaged(self: torch.nn.Module, *arguments: object, **rest: object) -> object:
        result = whole(self, *arguments, **rest)
        calls.append(1)
        if len(calls) == 1:
            (result.sample if part == "vae" else result[0])[..., 0] = value
        return result

    monkeypatch.setattr(kind, name, damaged)
    bad = DiffusionParams(seed=1, num_inference_steps=2, guidance_scale=0.0)
    stage.submit(task("bad", bad))
    events = run(stage)
    failed = events["bad"]
    assert isinstance(failed, StageFailed) and isinstance(failed.error, StageError)
    assert "not finite" in str(failed.error)
    stage.submit(task("good", bad))
    assert pictures(run(stage))["good"].shape == (1, 64, 64, 3)
