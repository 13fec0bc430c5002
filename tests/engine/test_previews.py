"""Previews of running pictures: what a diffusion stage shows, that it changes nothing, and how far it says it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dit import encoded_images, engine, pictures, random_pipeline, run, spec, task
from torch import Tensor

from vllm_omni.engine.base import Activity
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.errors import InvalidRequestError
from vllm_omni.messages import StageDone, StageEvent, StageProgress
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_runner import DiffusionState
from vllm_omni.worker.diffusion.preview_map import num_pairs

CHANNELS = 16


def random_map() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    rows = {"factors": CHANNELS, "products": num_pairs(CHANNELS)}
    return {
        "bias": [0.5] * 3,
        **{key: (torch.randn(n, 3, generator=generator) * 0.05).tolist() for key, n in rows.items()},
    }


@pytest.fixture(scope="module", params=["by a map", "by the VAE"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z-image")
    random_pipeline(path)
    if request.param == "by a map":
        (path / "vae" / "preview.json").write_text(json.dumps(random_map()))
    return path


def params(seed: int = 0, steps: int = 5, guidance: float = 0.0, **rest: Any) -> DiffusionParams:
    return DiffusionParams(seed=seed, num_inference_steps=steps, guidance_scale=guidance, **rest)


CROWD: dict[str, dict[str, Any]] = {
    "plain": {"seed": 1, "steps": 6},
    "guided": {"seed": 2, "steps": 4, "guidance": 3.0, "height": 32, "width": 96},
    "normed": {"seed": 3, "guidance": 2.0, "extra": {"cfg_normalization": 1.0, "cfg_truncation": 0.5}},
    "tall": {"seed": 4, "steps": 3, "height": 96, "width": 32},
    "two": {"seed": 5, "guidance": 4.0, "num_outputs": 2},
    "given": {"seed": 6, "steps": None, "sigmas": [1.0, 0.8, 0.3, 0.1]},
}


def drawn(stage: DiffusionEngine, num_previews: int | None, names: list[str]) -> tuple[dict[str, Tensor], Shown]:
    """The pictures of these of the crowd, in one batch, and what was shown of them meanwhile."""
    for name in names:
        stage.submit(task(name, params(**CROWD[name], num_previews=num_previews), seed=list(CROWD).index(name)))
    events: dict[str, StageEvent] = {}
    shown: Shown = {name: [] for name in names}
    while stage.activity() is Activity.BUSY:
        for event in stage.step():
            events[event.request_id] = event
            if isinstance(event, StageProgress) and event.previews is not None:
                shown[event.request_id].append((event.step, event.previews))
        stage.check_integrity()
    assert stage.get_stats()["running"] == 0
    return pictures(events), shown


Shown = dict[str, list[tuple[int, Tensor]]]  # by request, (step of the request, previews [N, H, W, 3])


@pytest.mark.parametrize("policy", ["none", "first_block", "taylorseer"])
def test_previews_change_no_picture(folder: Path, policy: str) -> None:
    threshold = 0.3 if policy == "first_block" else None
    expected, nothing = drawn(engine(folder, policy=policy, threshold=threshold), None, list(CROWD))
    assert not any(nothing.values())
    got, shown = drawn(engine(folder, policy=policy, threshold=threshold), 10, list(CROWD))
    assert all(shown.values())
    for name, picture in expected.items():
        assert torch.equal(got[name], picture), name


def test_a_preview_is_the_same_alone_and_in_a_batch(folder: Path) -> None:
    _, together = drawn(engine(folder), 3, list(CROWD))
    for name, expected in together.items():
        _, alone = drawn(engine(folder), 3, [name])
        assert len(alone[name]) == len(expected) == (2 if name == "tall" else 3)  # of three steps two are not the last
        for (step, one), (same_step, other) in zip(alone[name], expected, strict=True):
            assert step == same_step and (one.int() - other.int()).abs().max() <= 1, name


def test_a_preview_has_the_pictures_size_one_for_each_output(folder: Path) -> None:
    made, shown = drawn(engine(folder), 2, list(CROWD))
    for name, previews in shown.items():
        assert all(each.shape == made[name].shape and each.dtype is torch.uint8 for _, each in previews), name
    assert shown["two"][0][1].shape[0] == 2 and not torch.equal(*shown["two"][0][1])


def test_previews_come_after_the_steps_that_are_evenly_spread(folder: Path) -> None:
    _, shown = drawn(engine(folder), 2, ["plain", "tall"])
    assert [step for step, _ in shown["plain"]] == [1, 3]
    assert [step for step, _ in shown["tall"]] == [1, 2], "every step but the last"


def test_outputs_that_do_not_run_together_are_shown_together(folder: Path) -> None:
    together, crowd = drawn(engine(folder), 2, ["two"])
    apart, shown = drawn(engine(folder, max_batch_size=1), 2, ["two"])
    assert (apart["two"].int() - together["two"].int()).abs().max() <= 1
    for (_, one), (_, other) in zip(shown["two"], crowd["two"], strict=True):
        assert (one.int() - other.int()).abs().max() <= 1


SCHEDULERS: dict[str, dict[str, Any]] = {
    "shifted": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "terminal": {"shift_terminal": 0.02},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "inverted": {"invert_sigmas": True},
    "stochastic": {"stochastic_sampling": True},
}


@pytest.fixture(params=SCHEDULERS)
def scheduled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with one kind of schedule."""
    random_pipeline(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SCHEDULERS[request.param]}))
    return tmp_path


def test_under_every_schedule_the_last_estimate_is_the_end_and_the_picture_stays(scheduled: Path) -> None:
    torch.manual_seed(0)
    expected, _ = drawn(engine(scheduled), None, ["plain", "guided"])
    torch.manual_seed(0)
    got, shown = drawn(engine(scheduled), 3, ["plain", "guided"])
    for name, picture in expected.items():
        assert torch.equal(got[name], picture) and len(shown[name]) == 3, name

    stage, value = engine(scheduled), params(seed=1, steps=4)
    inputs = task("x", value).inputs
    trajectory = stage.model.trajectory(stage.model.prepare(inputs, value, 1, encoded_images()), value)
    generator = torch.Generator().manual_seed(1)
    state = DiffusionState("x", 0, value, trajectory, trajectory.noise(generator), generator)
    while not state.is_done:
        (outputs,), before = stage.runner.predict([state]), state.latents
        with torch.inference_mode():
            estimate = trajectory.estimate(before, outputs[0], state.step)
        stage.runner.advance(state, outputs)
    torch.testing.assert_close(estimate, state.latents, rtol=0, atol=1e-5)


def test_an_abort_between_previews_frees_all_and_the_next_is_the_same(folder: Path) -> None:
    stage = engine(folder)
    _, expected = drawn(engine(folder), 4, ["two"])
    for _ in range(2):
        stage.submit(task("two", params(**CROWD["two"], num_previews=4), seed=list(CROWD).index("two")))
        for _ in range(3):
            stage.step()
        stage.abort("two")
        stage.check_integrity()
        assert stage.activity() is Activity.IDLE and stage.get_stats()["running"] == 0
    _, shown = drawn(stage, 4, ["two"])
    assert [step for step, _ in shown["two"]] == [step for step, _ in expected["two"]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(shown["two"], expected["two"], strict=True))


def test_no_preview_is_computed_that_nobody_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for num_previews in (None, 0):
        stage = engine(folder)
        monkeypatch.setattr(stage.model, "preview", lambda latents: pytest.fail("a preview was made"))
        drawn(stage, num_previews, ["plain"])


def test_latents_alone_are_shown_too(folder: Path) -> None:
    stage = engine(folder, wanted=frozenset({"latents"}))
    stage.submit(task("x", params(steps=4, num_previews=2, output_type="latent")))
    events = [event for _ in range(4) for event in stage.step()]
    assert sum(isinstance(event, StageProgress) and event.previews is not None for event in events) == 2
    assert isinstance(events[-1], StageDone) and set(events[-1].payload.tensors) == {"latents"}


@pytest.mark.parametrize("bad", [-1, 11, 2.5, True, "3"])
def test_a_number_of_previews_that_makes_no_sense_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidRequestError, match="num_previews"):
        DiffusionParams(num_previews=bad)


def test_previews_by_default_are_left_out_by_who_says_0(folder: Path) -> None:
    known = spec(folder)
    assert known.model.gives_previews
    assert params(num_previews=0).with_defaults({"num_previews": 3}).num_previews == 0
    assert params().with_defaults({"num_previews": 3}).num_previews == 3


@pytest.mark.parametrize("batch", [64, 1])
def test_the_progress_of_several_outputs_never_goes_back_and_ends_at_all_of_them(folder: Path, batch: int) -> None:
    stage = engine(folder, max_batch_size=batch)
    stage.submit(task("x", params(steps=3, num_outputs=3)))
    events = []
    while stage.activity() is Activity.BUSY:
        events += stage.step()
    steps = [(event.step, event.num_steps) for event in events if isinstance(event, StageProgress)]
    assert steps == [(step, 9) for step in range(1, 10)]
    done = run(stage) or events[-1]
    assert isinstance(done, StageDone) and done.metrics["steps"] == 9
