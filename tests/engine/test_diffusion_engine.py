"""The diffusion stage: batch invariance, isolation, preparation, limits, no leak."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.dit import BOTH, engine, pictures, random_pipeline, run, spec, task

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import Activity, ReadPorts
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.errors import ConfigError, InvalidRequestError, StageError
from vllm_omni.messages import StageDone, StageFailed, StageProgress
from vllm_omni.params import DiffusionParams
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.diffusion.encoded_images import EncodedImages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z-image")
    random_pipeline(path)
    return path


def params(seed: int = 0, steps: int = 3, guidance: float = 0.0, **rest: object) -> DiffusionParams:
    return DiffusionParams(seed=seed, num_inference_steps=steps, guidance_scale=guidance, **rest)  # type: ignore[arg-type]


CROWD = {
    "a": params(1, 4, 0.0),
    "b": params(2, 3, 3.0, height=32, width=96),
    "c": params(3, 5, 2.0),
    "d": params(4, 2, 0.0, height=96, width=32),
    "e": params(5, 4, 4.0, num_outputs=2),
}


def test_a_picture_does_not_depend_on_its_batch_mates(folder: Path) -> None:
    alone = {}
    for index, (key, value) in enumerate(CROWD.items()):
        stage = engine(folder)
        stage.submit(task(key, value, seed=index))
        alone |= pictures(run(stage))
    for order in (list(CROWD), list(CROWD)[::-1]):
        stage = engine(folder)
        for key in order:
            stage.submit(task(key, CROWD[key], seed=list(CROWD).index(key)))
        for key, picture in pictures(run(stage)).items():
            assert (picture.int() - alone[key].int()).abs().max() <= 1, key


def test_a_seed_means_the_same_picture_and_output_i_is_seed_plus_i(folder: Path) -> None:
    stage = engine(folder)
    stage.submit(task("two", params(7, num_outputs=2)))
    stage.submit(task("first", params(7)))
    stage.submit(task("second", params(8)))
    stage.submit(task("unseeded", DiffusionParams(num_inference_steps=3, guidance_scale=0.0)))
    got = pictures(run(stage))
    assert (got["two"][0].int() - got["first"][0].int()).abs().max() <= 1
    assert (got["two"][1].int() - got["second"][0].int()).abs().max() <= 1
    assert not torch.equal(got["first"], got["unseeded"])


def test_every_step_is_one_denoising_step_of_every_running_request(folder: Path) -> None:
    stage = engine(folder)
    stage.submit(task("short", params(steps=2)))
    stage.submit(task("long", params(steps=4)))
    seen = [{(e.request_id, e.step) for e in stage.step() if isinstance(e, StageProgress)} for _ in range(4)]
    assert seen == [{("short", 1), ("long", 1)}, {("short", 2), ("long", 2)}, {("long", 3)}, {("long", 4)}]
    assert stage.activity() is Activity.IDLE


def test_the_token_budget_bounds_a_batch_but_never_starves_a_large_request(folder: Path) -> None:
    stage = engine(folder, max_batch_tokens=100)
    for key in "abc":
        stage.submit(task(key, params(steps=2)))
    batches = []
    while stage.activity() is Activity.BUSY:
        batches.append({e.request_id for e in stage.step() if isinstance(e, StageProgress)})
    assert batches == [{"a"}, {"a"}, {"b"}, {"b"}, {"c"}, {"c"}]


def test_only_wanted_ports_are_made(folder: Path) -> None:
    stage = engine(folder, wanted=frozenset({"latents"}))
    stage.submit(task("x", params()))
    event = run(stage)["x"]
    assert isinstance(event, StageDone) and set(event.payload.tensors) == {"latents"}
    stage = engine(folder)
    stage.submit(task("latent", params(output_type="latent")))
    stage.submit(task("image", params()))
    made = {key: set(event.payload.tensors) for key, event in run(stage).items() if isinstance(event, StageDone)}
    assert made == {"latent": {"latents"}, "image": {"image", "latents"}}


def test_latents_that_nobody_reads_are_refused(folder: Path) -> None:
    stage, value = spec(folder), params(output_type="latent")
    stage.check(task("x", value).request, value, BOTH)
    with pytest.raises(InvalidRequestError, match=r"output_type.*image\.latents"):
        stage.check(task("x", value).request, value, ReadPorts(frozenset({"image"})))


def test_sigmas_set_the_schedule(folder: Path) -> None:
    stage = engine(folder)
    stage.submit(task("given", DiffusionParams(seed=1, guidance_scale=0.0, sigmas=[1.0, 0.75, 0.5, 0.25])))
    stage.submit(task("same", params(1, steps=4)))
    stage.submit(task("other", DiffusionParams(seed=1, guidance_scale=0.0, sigmas=[1.0, 0.3])))
    got = pictures(run(stage))
    assert torch.equal(got["given"], got["same"]) and not torch.equal(got["given"], got["other"])


@pytest.mark.parametrize(
    "bad, field",
    [
        ({"height": 63}, "height"),
        ({"height": 100_000, "width": 10_000}, "height"),
        ({"width": 16 * 65}, "width"),
        ({"num_inference_steps": 100_000}, "num_inference_steps"),
        ({"guidance_scale": 1e6}, "guidance_scale"),
        ({"num_outputs": 1_000}, "num_outputs"),
        ({"strength": 0.5}, "strength"),
        ({"negative_prompt": "blur", "guidance_scale": 0.0}, "negative_prompt"),
        ({"duration_s": 2.0}, "duration_s"),
        ({"extra": {"cfg_normalisation": 1.0}}, "cfg_normalization"),
        ({"extra": {"cfg_truncation": float("nan")}}, "cfg_truncation"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "sigmas"),
    ],
)
def test_bad_requests_are_refused_with_their_field(folder: Path, bad: dict[str, object], field: str) -> None:
    stage, value = spec(folder), DiffusionParams(**bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=field):
        stage.check(task("x", value).request, value, BOTH)


@pytest.mark.parametrize(
    "bad",
    [
        {"guidance_scale": float("nan")},
        {"guidance_scale": float("inf")},
        {"guidance_scale": -1.0},
        {"seed": 2**63},
        {"seed": -1},
        {"seed": True},
        {"num_inference_steps": 0},
        {"num_inference_steps": 2.5},
        {"sigmas": [0.5, 1.0]},
        {"sigmas": []},
        {"sigmas": [1.0, float("nan")]},
        {"output_type": "jpeg"},
        {"negative_prompt": 3},
    ],
)
def test_impossible_values_never_make_params(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(bad))):
        DiffusionParams(**bad)  # type: ignore[arg-type]


def test_a_failing_request_harms_no_batch_mate(folder: Path) -> None:
    quiet, stage = engine(folder), engine(folder)
    for one in (quiet, stage):
        one.submit(task("good", params(3)))
    broken = task("nan", params(4))
    broken.inputs["prompt_embeds"].fill_(float("nan"))  # type: ignore[union-attr]
    stage.submit(broken)
    stage.submit(
        task("wide", params(5)).__class__(
            broken.request.from_prompt({"prompt": "x", "request_id": "wide"}),
            "image",
            params(5),
            {"prompt_embeds": torch.zeros(3, 7)},
        )
    )
    stage.submit(task("long", params(6), length=1000))
    events = run(stage)
    assert {k for k, e in events.items() if isinstance(e, StageFailed)} == {"nan", "wide", "long"}
    failed = events["nan"]
    assert isinstance(failed, StageFailed) and isinstance(failed.error, StageError) and "finite" in str(failed.error)
    assert torch.equal(pictures({"good": events["good"]})["good"], pictures(run(quiet))["good"])
    assert stage.get_stats()["running"] == 0


def in_bands(stage: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, num_given: int = 4) -> None:
    """The stage decodes a picture in four bands of rows, and gives `num_given` of them."""
    whole = stage.model.decode

    def decode(latents: torch.Tensor, kept: slice) -> Iterator[torch.Tensor]:
        yield from next(whole(latents, kept)).chunk(4)[:num_given]

    monkeypatch.setattr(stage.model, "decode", decode)
    monkeypatch.setattr(stage.model, "num_pieces", lambda latents, kept: 4)
    monkeypatch.setattr(stage.model, "assemble", lambda pieces, params: torch.cat(list(pieces)))


def test_a_step_decodes_one_piece_of_the_oldest_while_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stage = engine(folder), engine(folder)
    in_bands(stage, monkeypatch)
    for one in (whole, stage):
        one.submit(task("first", params(1, steps=1)))
        one.submit(task("second", params(2, steps=2)))
        one.submit(task("long", params(3, steps=9)))
    expected = pictures(run(whole))
    events = [stage.step() for _ in range(9)]
    done = {e.request_id: n for n, step in enumerate(events) for e in step if isinstance(e, StageDone)}
    assert done == {"first": 3, "second": 7}, "four pieces each, the second begins when the first is whole"
    steps = [e.step for step in events for e in step if isinstance(e, StageProgress) and e.request_id == "long"]
    assert steps == [*range(1, 10), 9], "one denoising step at each, then the first piece"
    got = pictures({e.request_id: e for step in events for e in step if isinstance(e, StageDone)} | run(stage))
    for key, picture in expected.items():
        assert torch.equal(got[key], picture), key


def test_an_abort_between_two_pieces_frees_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = engine(folder)
    in_bands(stage, monkeypatch)
    for key in "ab":
        stage.submit(task(key, params(ord(key), steps=1, num_outputs=2)))
    stage.step()
    stage.abort("a")
    stage.check_integrity()
    assert set(run(stage)) == {"b"} and stage.get_stats()["running"] == 0


def test_what_an_aborted_task_had_to_say_is_not_said_of_its_successor(folder: Path) -> None:
    stage = engine(folder)
    stage.submit(task("x", params(6), length=1000))
    stage.abort("x")
    stage.submit(task("x", params(1)))
    assert isinstance(run(stage)["x"], StageDone)


def test_a_decoder_that_ends_early_fails_its_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = engine(folder)
    in_bands(stage, monkeypatch, num_given=3)
    stage.submit(task("a", params(steps=1)))
    event = run(stage)["a"]
    assert isinstance(event, StageFailed) and "3 of 4 pieces" in str(event.error)


def prepared_in(stage: DiffusionEngine, monkeypatch: pytest.MonkeyPatch, heavy: str = "") -> list[list[str]]:
    """For every step so far, the seeds of the requests that were prepared in it; those in `heavy` read media."""
    by_step: list[list[str]] = []
    prepare, step = stage.model.prepare, stage.step

    def counted(inputs: Any, params: DiffusionParams, seed: int, encoded: EncodedImages) -> Any:
        by_step[-1].append(chr(seed))
        return prepare(inputs, params, seed, encoded)

    def counted_step() -> Any:
        by_step.append([])
        return step()

    monkeypatch.setattr(stage.model, "prepare", counted)
    monkeypatch.setattr(stage.model, "is_heavy", lambda inputs, params: inputs["prompt_embeds"].shape[0] == 9)
    monkeypatch.setattr(stage, "step", counted_step)
    for key in "abcd":
        stage.submit(task(key, params(ord(key), steps=3), length=9 if key in heavy else 7))
    return by_step


def test_submitting_runs_nothing_and_all_that_came_is_prepared_in_the_next_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = engine(folder)
    by_step = prepared_in(stage, monkeypatch)
    assert by_step == [] and stage.activity() is Activity.BUSY
    progress = [event.request_id for event in stage.step() if isinstance(event, StageProgress)]
    assert progress == list("abcd") and by_step == [list("abcd")]


def test_one_task_with_media_is_prepared_per_step_while_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, stage = engine(folder), engine(folder)
    for key in "abcd":
        quiet.submit(task(key, params(ord(key), steps=3), length=9 if key in "abd" else 7))
    by_step = prepared_in(stage, monkeypatch, heavy="abd")
    stage.step()
    stage.check_integrity()
    stage.abort("d")
    events = run(stage)
    assert by_step[:3] == [["a", "c"], ["b"], []]
    expected = pictures(run(quiet))
    for key, picture in pictures(events).items():
        assert (picture.int() - expected[key].int()).abs().max() <= 1, key
    assert stage.activity() is Activity.IDLE


def test_a_task_that_is_given_up_before_its_step_was_never_prepared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = engine(folder)
    by_step = prepared_in(stage, monkeypatch)
    for key in "abcd":
        stage.abort(key)
    assert stage.activity() is Activity.IDLE and stage.step() == [] and by_step == [[]]
    assert stage.get_stats()["running"] == 0


def test_a_spec_reads_its_folder_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, value = spec(folder), params(guidance=1.0)
    monkeypatch.setattr(Path, "read_text", lambda *args, **rest: pytest.fail("a file was read"))
    request = task("x", value).request
    known.check(request, value, BOTH)
    assert known.needed_inputs(request, value) == {"prompt_embeds", "negative_prompt_embeds"}
    assert known.job_size(request, value, None) == 2 * known.job_size(request, params(guidance=0.0), None) > 0
    assert known.signature.results == {"image"} and known.weights_key()[0] == "dit"


def test_a_stage_without_a_folder_or_of_an_unknown_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    config = OmniConfig()
    with pytest.raises(ConfigError, match=r"^model: missing; expected a diffusers pipeline folder"):
        DiffusionSpec.describe(StageConfig("image", "dit"), config, ModelFolders())
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipelin"}')
    with pytest.raises(ConfigError, match=r"diffusion model: got 'ZImagePipelin' \(did you mean 'ZImagePipeline'\?\)"):
        spec(tmp_path)
    with pytest.raises(ConfigError, match=r"^part: got 'token2wav', but .* holds one diffusers pipeline; leave it out"):
        spec(folder, part="token2wav")


def test_a_batch_that_breaks_is_retried_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = engine(folder)
    for key in "abc":
        stage.submit(task(key, params(ord(key))))
    whole = stage.runner.predict

    def out_of_memory_for_b(states):  # type: ignore[no-untyped-def]
        if any(state.request_id == "b" for state in states):
            raise MemoryError("out of memory")
        return whole(states)

    monkeypatch.setattr(stage.runner, "predict", out_of_memory_for_b)
    events = run(stage)
    assert isinstance(events["b"], StageFailed) and "out of memory" in str(events["b"].error)
    assert isinstance(events["a"], StageDone) and isinstance(events["c"], StageDone)


def test_neutral_guidance_needs_no_negative_prompt(folder: Path) -> None:
    stage = spec(folder)

    def needed(value: DiffusionParams) -> frozenset[str]:
        return stage.needed_inputs(task("x", value).request, value)

    assert needed(params(guidance=0.0)) == {"prompt_embeds"}
    assert needed(params(guidance=0.5)) == set(stage.stage.inputs)
    assert needed(DiffusionParams()) == set(stage.stage.inputs), "default is 5"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "step", "step", "abort"]), st.integers(0, 5), st.sampled_from([0.0, 2.0])),
        max_size=25,
    )
)
def test_random_operations_leak_nothing(folder: Path, operations: list[tuple[str, int, float]]) -> None:
    stage = engine(folder, policy="first_block", threshold=0.3, max_batch_tokens=300, cache_mb=0.1)
    added: set[str] = set()
    ended: list[str] = []
    for number, (operation, which, guidance) in enumerate(operations):
        if operation == "add":
            key = f"{number}"
            stage.submit(task(key, params(which, 1 + which % 3, guidance, height=32, width=32)))
            added.add(key)
        elif operation == "step":
            ended += [e.request_id for e in stage.step() if isinstance(e, StageDone | StageFailed)]
        elif added:
            key = sorted(added)[which % len(added)]
            stage.abort(key)
            added.discard(key)
        stage.check_integrity()
    ended += [key for key, event in run(stage).items() if isinstance(event, StageDone | StageFailed)]
    assert len(ended) == len(set(ended)) and added <= set(ended)
    assert stage.get_stats()["running"] == 0 and stage.get_stats()["step_cache_used_bytes"] == 0
