"""Step caches in the diffusion stage: what they skip, whose decisions they are, their memory, their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dit import BOTH, encoded_images, engine, pictures, random_pipeline, run, spec, task
from support.speech import save_tiny_omni
from support.token2wav import engine as speech_engine
from support.toy_caches import TOYS, SumRow, add_toys

from vllm_omni.config.loader import load_config
from vllm_omni.core.diffusion.caches.recording import Recording
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.errors import ConfigError, InvalidRequestError, ResourceError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageProgress
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_runner import CachedStep, measure

NUM_BLOCKS = 3
TOKENS = 64  # of one branch of a 64 x 64 picture: 16 patches and 7 words, both padded to 32
ROW_BYTES = 2 * TOKENS * 64 * 4  # that first_block keeps of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z-image")
    random_pipeline(path)
    return path


def params(seed: int = 0, steps: int = 3, guidance: float = 0.0, **rest: Any) -> DiffusionParams:
    return DiffusionParams(seed=seed, num_inference_steps=steps, guidance_scale=guidance, **rest)


CROWD = {
    "a": params(1, 8, 0.0),
    "b": params(2, 6, 3.0, height=32, width=96),
    "c": params(3, 10, 2.0),
    "d": params(4, 2, 0.0, height=96, width=32),
    "e": params(5, 7, 4.0, num_outputs=2),
}
CACHES: list[Mapping[str, Any]] = [
    {"policy": "first_block", "threshold": 1.2},
    {"policy": "taylorseer"},
    {"policy": "taylorseer", "interval": 3, "warmup_steps": 1, "order": 2},
    *({"policy": name, "threshold": 1.5} for name in TOYS),
]


def done(stage: DiffusionEngine, key: str, value: DiffusionParams, seed: int = 0) -> StageDone:
    stage.submit(task(key, value, seed=seed))
    event = run(stage)[key]
    assert isinstance(event, StageDone), event
    return event


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: "-".join(map(str, cache.values())))
def test_a_picture_does_not_depend_on_its_batch_mates(
    folder: Path, cache: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and in a crowd of other lengths, sizes and branches: the same picture and the same reused steps."""
    add_toys(monkeypatch)
    alone = {key: done(engine(folder, cache=cache), key, value, i) for i, (key, value) in enumerate(CROWD.items())}
    assert sum(event.metrics["cache_hits"] for event in alone.values()) > 0
    stage = engine(folder, cache=cache)
    for key in reversed(CROWD):
        stage.submit(task(key, CROWD[key], seed=list(CROWD).index(key)))
    for key, event in run(stage).items():
        assert isinstance(event, StageDone) and event.metrics == alone[key].metrics
        difference = event.payload.tensors["image"].int() - alone[key].payload.tensors["image"].int()
        assert difference.abs().max() <= 1, key
    assert stage.get_stats()["step_cache_used_bytes"] == 0


def test_first_block_skips_steps_and_frees_its_memory(folder: Path) -> None:
    exact, loose, strict = (
        engine(folder, policy=policy, threshold=threshold)
        for policy, threshold in (("none", None), ("first_block", 10.0), ("first_block", 0.0))
    )
    value = params(steps=6, guidance=2.0)
    exact_event, loose_event, strict_event = (done(stage, "x", value) for stage in (exact, loose, strict))
    assert loose_event.metrics["cache_hits"] == 5 * 2, "all but the first step, on both branches"
    assert strict_event.metrics["cache_hits"] == 0
    assert torch.equal(strict_event.payload.tensors["image"], exact_event.payload.tensors["image"])
    assert not torch.equal(loose_event.payload.tensors["latents"], exact_event.payload.tensors["latents"])
    assert loose.get_stats()["step_cache_used_bytes"] == 0


def test_taylorseer_of_interval_1_equals_no_cache_and_of_5_skips_by_its_schedule(folder: Path) -> None:
    value = params(steps=12, guidance=2.0)
    exact = done(engine(folder), "x", value)
    every = done(engine(folder, cache={"policy": "taylorseer", "interval": 1}), "x", value)
    fifth = done(engine(folder, cache={"policy": "taylorseer"}), "x", value)
    assert every.metrics["cache_hits"] == 0 and fifth.metrics["cache_hits"] == 2 * (12 - 5)
    assert torch.equal(every.payload.tensors["latents"], exact.payload.tensors["latents"])
    assert not torch.equal(fifth.payload.tensors["latents"], exact.payload.tensors["latents"])


def test_the_modulated_input_is_what_the_first_block_attends_with(folder: Path) -> None:
    stage = engine(folder)
    prepared = stage.model.prepare(task("x", params()).inputs, params(), 0, encoded_images())
    trajectories = [stage.model.trajectory(prepared, params(seed)) for seed in (1, 2)]
    latents, seen = [trajectory.noise(torch.Generator().manual_seed(1)) for trajectory in trajectories], []
    block = stage.model.transformer.layers[0]  # type: ignore[attr-defined]
    with torch.inference_mode():
        conditions = [trajectory.conditions["positive"] for trajectory in trajectories]
        tokens = stage.model.embed(latents, [900.0, 200.0], conditions)
        handle = block.attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        stage.model.run_blocks(tokens, 0, 1)
        handle.remove()
        assert torch.equal(torch.cat(stage.model.modulated_input(tokens)), seen[0])


def test_a_policy_that_asks_for_what_the_model_does_not_give_is_refused_at_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_toys(monkeypatch)
    with pytest.raises(ConfigError, match=r"cache\.policy: SumPolicy .*Token2Wav does not give"):
        speech_engine(save_tiny_omni(tmp_path), policy="toy_sum")
    monkeypatch.setattr("support.toy_caches.MiddlePolicy.num_tail_blocks", NUM_BLOCKS)
    with pytest.raises(ConfigError, match=r"1 lead and 3 tail blocks, but the model has 3"):
        engine(folder, policy="toy_middle")


def test_tail_blocks_are_computed_at_every_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_toys(monkeypatch)
    stage = engine(folder, policy="toy_middle", threshold=100.0)
    run_blocks, ran = stage.model.run_blocks, []

    def counted(tokens: Any, start: int, stop: int) -> Any:
        ran.append((start, stop))
        return run_blocks(tokens, start, stop)

    monkeypatch.setattr(stage.model, "run_blocks", counted)
    assert done(stage, "x", params(steps=3)).metrics["cache_hits"] == 2
    assert ran == [(0, 1), (1, 2), (2, 3), (0, 1), (2, 3), (0, 1), (2, 3)]


def test_all_rows_are_decided_with_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, transfers = [SumRow(0.1) for _ in range(4)], []
    steps = [CachedStep(_row(), row) for row in rows]
    for row in rows[:3]:
        row.update(0, torch.ones(2, 3), (), torch.ones(2, 3))
    whole = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor.shape) or whole(tensor))
    measure(steps, [torch.full((2, 3), 1.0 + index / 4) for index in range(4)])
    assert transfers == [(3,)]
    assert [step.measured for step in steps] == [[0.0], [0.25], [0.5], ()]


def _row() -> Any:
    class State:
        step = 1

    class Row:
        state = State()

    return Row()


def test_a_batch_that_fails_is_tried_again_with_the_same_decisions(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of changes must not count a step twice."""
    add_toys(monkeypatch)
    cache = {"policy": "toy_sum", "threshold": 1.5}
    alone = [done(engine(folder, cache=cache), key, params(i, 10), i) for i, key in enumerate("ab")]
    stage = engine(folder, cache=cache)
    whole = stage.model.unembed

    def out_of_memory_for_two(tokens: Any) -> list[torch.Tensor]:
        if len(tokens.order) > 1:
            raise MemoryError("out of memory")
        return whole(tokens)

    monkeypatch.setattr(stage.model, "unembed", out_of_memory_for_two)
    for index, key in enumerate("ab"):
        stage.submit(task(key, params(index, 10), seed=index))
    events = run(stage)
    for key, expected in zip("ab", alone, strict=True):
        event = events[key]
        assert isinstance(event, StageDone) and event.metrics == expected.metrics
        assert 0 < event.metrics["cache_hits"] < 9
        assert torch.equal(event.payload.tensors["latents"], expected.payload.tensors["latents"])


# Memory


def test_a_request_whose_step_cache_never_fits_fails_with_the_key_to_raise(folder: Path) -> None:
    stage = engine(folder, policy="first_block", cache_mb=1.5 * ROW_BYTES / 2**20)
    stage.submit(task("guided", params(guidance=2.0)))
    stage.submit(task("plain", params()))
    events = run(stage)
    failed = events["guided"]
    assert isinstance(failed, StageFailed) and isinstance(failed.error, ResourceError)
    words = f"dit_cache.max_memory_mb: the step cache of this request needs {2 * ROW_BYTES} bytes, expected at most"
    assert words in str(failed.error)
    assert isinstance(events["plain"], StageDone)


def test_samples_wait_for_memory_in_order_and_their_pictures_are_the_same(folder: Path) -> None:
    """Room for one and a half: they run one after another, as if each were alone."""
    wide = engine(folder, policy="first_block", threshold=1.2)
    tight = engine(folder, policy="first_block", threshold=1.2, cache_mb=1.5 * ROW_BYTES / 2**20)
    keys, order = "abc", []
    for key in keys:
        wide.submit(task(key, params(ord(key), 4)))
        tight.submit(task(key, params(ord(key), 4)))
    expected, last = run(wide), {}
    for _ in range(12):
        for event in tight.step():
            last[event.request_id] = event
            order += [event.request_id] if isinstance(event, StageProgress) else []
        tight.check_integrity()
    assert order == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert _metrics(last) == _metrics(expected) and any(m["cache_hits"] for m in _metrics(last).values())
    for key, picture in pictures(expected).items():
        assert (pictures(last)[key].int() - picture.int()).abs().max() <= 1
    assert tight.get_stats()["step_cache_evictions"] == 0 and tight.get_stats()["step_cache_used_bytes"] == 0


def _metrics(events: Mapping[str, StageEvent]) -> dict[str, Any]:
    return {key: event.metrics for key, event in events.items() if isinstance(event, StageDone)}


def test_what_a_running_sample_reserves_is_what_the_policy_says(folder: Path) -> None:
    for cache, num_kept in (({"policy": "first_block"}, 2), ({"policy": "taylorseer", "order": 3}, 4)):
        stage = engine(folder, cache=cache)
        stage.submit(task("x", params(guidance=2.0)))
        stage.step()
        assert stage.get_stats()["step_cache_used_bytes"] == num_kept * ROW_BYTES, "two branches"
        stage.abort("x")
        assert stage.get_stats()["step_cache_used_bytes"] == 0
    stage = engine(folder)
    stage.submit(task("x", params()))
    stage.step()
    assert stage.get_stats()["step_cache_used_bytes"] == 0


def test_the_memory_plan_holds_the_budget_where_there_is_a_policy(folder: Path) -> None:
    pictures = 64 * 2**20  # what is kept of those that requests bring
    assert spec(folder).plan_memory().step_cache_bytes == pictures
    assert spec(folder, cache={"policy": "taylorseer"}).plan_memory().step_cache_bytes == 2**30 + pictures


# Options

YAML = {"stages": {"image": {"kind": "dit", "model": "image"}}, "outputs": ["image"]}


@pytest.mark.parametrize(
    "override, words",
    [
        ("{policy: first_block, thresold: 0.1}", r"image\.cache\.thresold: unknown key \(did you mean 'threshold'\?\)"),
        ("{policy: taylorseer, threshold: 0.1}", r"image\.cache\.threshold: unknown key \(known: interval, order"),
        ("{policy: taylorseer, interval: 2.5}", r"image\.cache\.interval: got 2\.5, expected an integer"),
        ("{policy: taylorseer, order: -1}", r"image\.cache\.order: got -1"),
        ("{policy: first_block, threshold: -1}", r"image\.cache\.threshold: got -1"),
        ("{policy: first_blok}", r"image\.cache\.policy: got 'first_blok' \(did you mean 'first_block'\?\)"),
        ("{policy: 3}", r"image\.cache\.policy: got 3 \(known: dbcache, first_block"),
        ("{policy: none, threshold: 0.1}", r"image\.cache\.threshold: policy 'none' reads no keys"),
        ("{policy: teacache}", r"image\.cache\.coefficients: missing; .*vllm-omni calibrate CONFIG --policy teacache"),
        ("{policy: magcache, ratios: [1.0]}", r"image\.cache\.fitted_on: missing; .*vllm-omni calibrate CONFIG"),
        ("{policy: magcache, ratios: [.nan], fitted_on: x}", r"image\.cache\.ratios\[0\]: got nan"),
        ("{policy: dbcache, lead_blocks: 0}", r"image\.cache\.lead_blocks: got 0"),
        ("{threshold: 0.1}", r"image\.cache\.threshold: policy 'none' reads no keys"),
        ("fast", r"image\.cache: got 'fast', expected a mapping"),
    ],
)
def test_a_wrong_key_of_a_policy_is_named_at_load(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(YAML, [f"image.cache={override}"])


def test_a_policy_s_own_keys_reach_it() -> None:
    config = load_config(YAML, ["image.cache={policy: taylorseer, interval: 2}", "image.cache.order=2"])
    policy = config.stages["image"].options.make_policy()
    row = policy.new_row(9)
    row.update(4, None, (), torch.ones(1, 1))
    assert policy.row_bytes(10, 4) == 3 * 10 * 4 and row.decides_to_reuse(5, ()) and not row.decides_to_reuse(6, ())
    assert load_config(YAML).stages["image"].options.make_policy().computes_all


# What was fitted on one model


def teacache(folder: Path, threshold: float, **keys: Any) -> dict[str, Any]:
    """A polynomial that takes the input's change for the residual's."""
    fitted = {"coefficients": [1.0, 0.0], "fitted_on": spec(folder).model.fingerprint(), "fitted_steps": 10}
    return {"policy": "teacache", "threshold": threshold, **fitted, **keys}


def magcache(folder: Path, threshold: float, **keys: Any) -> dict[str, Any]:
    fitted = {"ratios": [1.0, 1.02, 0.97, 1.01], "fitted_on": spec(folder).model.fingerprint()}
    return {"policy": "magcache", "threshold": threshold, **fitted, **keys}


@pytest.mark.parametrize("policy", ["teacache", "magcache", "dbcache", "dbcache_tail", "taylorseer"])
def test_a_crowd_changes_no_decision_and_a_threshold_of_0_changes_no_bit(folder: Path, policy: str) -> None:
    """Alone, in a crowd of other sizes and branches, and against no cache."""
    crowd = {key: dataclasses.replace(value, num_inference_steps=10) for key, value in CROWD.items()}
    loose, strict = {
        "teacache": (teacache(folder, 2.0), teacache(folder, 0.0)),
        "magcache": (magcache(folder, 0.1), magcache(folder, 0.0)),
        "dbcache": ({"policy": "dbcache", "lead_blocks": 1, "threshold": 1.3, "max_skips": 2}, None),
        "dbcache_tail": (
            {"policy": "dbcache", "lead_blocks": 1, "tail_blocks": 1, "threshold": 1.3},
            {"policy": "dbcache", "lead_blocks": 1, "tail_blocks": 1, "threshold": 0.0},
        ),
        "taylorseer": ({"policy": "taylorseer"}, {"policy": "taylorseer", "interval": 1}),
    }[policy]
    alone = {key: done(engine(folder, cache=loose), key, value, i) for i, (key, value) in enumerate(crowd.items())}
    hits = {key: event.metrics["cache_hits"] for key, event in alone.items()}
    assert all(0 < hits[key] < 10 * 4 for key in crowd)
    stage = engine(folder, cache=loose)
    for index, (key, value) in enumerate(crowd.items()):
        stage.submit(task(key, value, seed=index))
    for key, event in run(stage).items():
        assert isinstance(event, StageDone) and event.metrics["cache_hits"] == hits[key]
        difference = event.payload.tensors["image"].int() - alone[key].payload.tensors["image"].int()
        assert difference.abs().max() <= 1, key
    assert stage.get_stats()["step_cache_used_bytes"] == 0
    exact = done(engine(folder), "c", crowd["c"], 2)
    assert not torch.equal(alone["c"].payload.tensors["latents"], exact.payload.tensors["latents"])
    if strict is not None:
        event = done(engine(folder, cache=strict), "c", crowd["c"], 2)
        assert event.metrics["cache_hits"] == 0
        assert torch.equal(event.payload.tensors["latents"], exact.payload.tensors["latents"])


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(4)),
    delays=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    aborted=st.sets(st.integers(0, 3), max_size=2),
    cache_rows=st.integers(2, 8),
    policy=st.sampled_from(["teacache", "magcache", "dbcache", "first_block"]),
)
def test_no_decision_depends_on_who_comes_who_goes_and_how_much_memory_there_is(
    folder: Path, order: list[int], delays: list[int], aborted: set[int], cache_rows: int, policy: str
) -> None:
    cache = {
        "teacache": teacache(folder, 2.0),
        "magcache": magcache(folder, 0.1),
        "dbcache": {"policy": "dbcache", "lead_blocks": 1, "tail_blocks": 1, "threshold": 1.3},
        "first_block": {"policy": "first_block", "threshold": 1.3},
    }[policy]
    values = [params(index, 10, float(index % 2)) for index in range(4)]
    if policy not in _ALONE:
        _ALONE[policy] = [
            done(engine(folder, cache=cache), "x", value, index).metrics["cache_hits"]
            for index, value in enumerate(values)
        ]
    stage = engine(folder, cache=cache, cache_mb=cache_rows * ROW_BYTES / 2**20)
    found = {}
    for turn, index in enumerate(order):
        stage.submit(task(str(index), values[index], seed=index))
        for _ in range(delays[turn]):
            found |= {event.request_id: event for event in stage.step()}
    for index in aborted:
        stage.abort(str(index))
    found |= run(stage)
    for key, event in found.items():
        if isinstance(event, StageDone):
            assert event.metrics["cache_hits"] == _ALONE[policy][int(key)]
        else:
            assert int(key) in aborted
    assert stage.get_stats()["step_cache_used_bytes"] == 0


_ALONE: dict[str, list[int]] = {}  # policy -> replayed rows of each request by itself


def test_numbers_of_another_model_are_refused_when_the_stage_is_loaded(folder: Path, tmp_path: Path) -> None:
    """Also of one with the same configuration and other weights."""
    cache = magcache(folder, 0.1)
    random_pipeline(tmp_path, seed=5)
    assert (tmp_path / "transformer" / "config.json").read_text() == (folder / "transformer/config.json").read_text()
    with pytest.raises(ConfigError, match=r"cache\.fitted_on: got '\w{16}', but .* is '\w{16}': .*another model"):
        engine(tmp_path, cache=cache)
    assert done(engine(folder, cache=cache), "x", params(steps=8)).metrics["cache_hits"] > 0


def test_a_polynomial_is_refused_for_steps_that_it_was_not_fitted_on_and_ratios_are_not(folder: Path) -> None:
    ten, nine = params(steps=10), params(steps=9)
    fitted = spec(folder, cache=teacache(folder, 0.2))
    fitted.check(task("x", ten).request, ten, BOTH)
    with pytest.raises(InvalidRequestError, match=r"num_inference_steps: got 9, expected 10, .*vllm-omni calibrate"):
        fitted.check(task("x", nine).request, nine, BOTH)
    spec(folder, cache=magcache(folder, 0.2)).check(task("x", nine).request, nine, BOTH)


def test_recording_changes_nothing_and_notes_every_row(folder: Path) -> None:
    value = params(steps=4, guidance=2.0)
    exact = done(engine(folder), "x", value)
    stage = engine(folder, cache={"policy": "recording", "signal": "modulated_input"})
    event = done(stage, "x", value)
    assert torch.equal(event.payload.tensors["latents"], exact.payload.tensors["latents"])
    assert isinstance(stage.spec.policy, Recording)
    assert sorted(record.step for record in stage.spec.policy.records) == [1, 1, 2, 2, 3, 3], "two branches"
    assert all(record.input_change is not None for record in stage.spec.policy.records)
