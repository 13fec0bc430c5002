"""Codes that come chunk by chunk: what the chunks add up to, their order, pauses, failures, no leak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.speech import TOKEN2WAV, save_tiny_omni, tiny_config
from support.token2wav import (
    PUBLISHED_BIGVGAN,
    SAMPLES,
    Ran,
    chunks,
    codes,
    engine,
    params,
    run,
    sound,
    streamed_sound,
    task,
)
from torch import Tensor

from vllm_omni.engine.base import Activity, ReadPorts
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.messages import StageDone, StageFailed, StageProgress, StageRows
from vllm_omni.models.qwen2_5_omni.token2wav.model import Token2Wav
from vllm_omni.models.qwen2_5_omni.token2wav.trajectory import EVALUATIONS, num_points
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StreamChunk
from vllm_omni.worker.model_pool import ModelPool

POOL = ModelPool()
STREAMED = ("audio",)
OPERATIONS = ("add", "feed", "feed", "step", "step", "pause", "resume", "abort")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_omni(tmp_path_factory.mktemp("omni"))


def stage_of(folder: Path, **rest: object) -> DiffusionEngine:
    return engine(folder, pool=POOL, **{"streamed": STREAMED, **rest})  # type: ignore[arg-type]


def full_context(stage: DiffusionEngine, value: DiffusionParams) -> tuple[int, int]:
    """(codes before, codes behind) that the new ones depend on at most: blocks that the evaluations reach, to the end
    of a block, and the frames that the vocoder reads.
    """
    model = stage.model
    assert isinstance(model, Token2Wav)
    dit, evaluations = model.config.dit, EVALUATIONS * (num_points(value) - 1)
    frames = [
        reach + dit.block_size * (1 + evaluations * blocks)
        for reach, blocks in zip(model.vocoder.geometry.reach, (dit.blocks_back, dit.blocks_ahead), strict=True)
    ]
    return -(-frames[0] // dit.repeats), -(-frames[1] // dit.repeats)


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("first, size", [(1, 11), (10, 10), (30, 20)])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_with_full_context_chunks_join_to_the_whole(folder: Path, first: int, size: int, guidance: float) -> None:
    stage, value, rows = stage_of(folder, wanted=("audio", "latents")), params(2, guidance, seed=9), codes(110)
    stage.submit(task("whole", rows, value))
    whole = run(stage).last["whole"]
    left, ahead = full_context(stage, value)
    parts = chunks(rows, first, size, left, ahead)
    assert len(parts) > 2 and any(part.start - part.num_before > 0 for part in parts), "a context that starts late"
    stage.submit(task("x", parts[0], value))
    for part in parts[1:]:
        stage.feed("x", "codes", part)
    ran = run(stage)
    done = ran.last["x"]
    assert isinstance(whole, StageDone) and isinstance(done, StageDone)
    for port in ("audio", "latents"):
        assert_near(done.payload.tensors[port], whole.payload.tensors[port])
    events = ran.rows["x"]
    assert [len(event.rows) for event in events] == [(part.stop - part.start) * SAMPLES for part in parts]
    assert torch.equal(torch.cat([event.rows for event in events]).T, done.payload.tensors["audio"][0])
    assert [event.is_last for event in events] == [False] * (len(parts) - 1) + [True]
    assert {event.port for event in events} == {"audio"} and events[0].meta == {"sample_rate": 24_000}
    assert ran.consumed["x"] == len(parts) and done.metrics["steps"] == 4 * len(parts)


@pytest.mark.parametrize("missing", ["left", "ahead"])
def test_with_less_than_full_context_they_do_not(folder: Path, missing: str) -> None:
    stage, value, rows = stage_of(folder), params(2, seed=9), codes(110)
    left, ahead = full_context(stage, value)
    short = chunks(rows, 20, 20, left // 4 if missing == "left" else left, ahead // 4 if missing == "ahead" else ahead)
    whole = sound(stage, rows, value)
    assert (streamed_sound(stage, short, value) - whole).abs().max() > 3e-4 * whole.abs().max()


def test_a_second_and_a_quarter_of_look_around_comes_near_and_has_no_audible_seam(tmp_path: Path) -> None:
    """Published block size, layers' reach and vocoder; 25 new codes, 25 before them, 12 behind."""
    dit = {**TOKEN2WAV["dit_config"], "block_size": 24}
    vocoder = {**TOKEN2WAV["bigvgan_config"], **PUBLISHED_BIGVGAN, "upsample_initial_channel": 64}
    save_tiny_omni(tmp_path, config=tiny_config(token2wav_config={"dit_config": dit, "bigvgan_config": vocoder}))
    stage, value, rows = engine(tmp_path, streamed=STREAMED), params(10, seed=3), codes(75)
    whole, hop = sound(stage, rows, value), 480

    def error_and_seams(left: int, ahead: int) -> tuple[float, Tensor]:
        parts = chunks(rows, 25, 25, left, ahead)
        got = streamed_sound(stage, parts, value)
        error = (got - whole).square().mean().sqrt() / whole.square().mean().sqrt()
        return float(error), got[0].diff().abs()[[part.start * hop - 1 for part in parts[1:]]]

    error, seams = error_and_seams(25, 12)
    assert error < 0.015, "measured: 0.006 to 0.008"
    assert seams.max() <= whole[0].diff().abs().quantile(0.95), "no seam stands out among the sound's own jumps"
    assert error_and_seams(0, 0)[0] > 0.1, "context does it"


def test_a_whole_payload_is_one_chunk_and_exactly_the_whole(folder: Path) -> None:
    stage, rows = stage_of(folder), codes(20)
    stage.submit(task("x", rows, params()))
    ran = run(stage)
    [event] = ran.rows["x"]
    assert event.is_last and torch.equal(event.rows.T, ran.sound("x")[0]) and ran.consumed["x"] == 1
    assert torch.equal(ran.sound("x")[0], sound(engine(folder, pool=POOL), rows, params()))


def test_only_what_is_read_is_kept(folder: Path) -> None:
    parts = chunks(codes(20), 8, 8, 6, 3)
    stage = stage_of(folder, wanted=())
    rows = streamed_sound(stage, parts, params())
    stage = stage_of(folder, wanted=("audio",), streamed=())
    stage.submit(task("x", parts[0], params()))
    for part in parts[1:]:
        stage.feed("x", "codes", part)
    ran = run(stage)
    assert not ran.rows and torch.equal(ran.sound("x")[0], rows)
    stage = stage_of(folder, wanted=("latents",), streamed=())
    stage.submit(task("x", codes(20), params()))
    event = run(stage).last["x"]
    assert isinstance(event, StageDone) and set(event.payload.tensors) == {"latents"}


@pytest.mark.parametrize("num_steps", [0, 1, 5, 9, 30])
def test_when_a_chunk_arrives_changes_nothing(folder: Path, num_steps: int) -> None:
    stage, parts = stage_of(folder), chunks(codes(40, 3), 9, 11, 6, 6)
    expected = streamed_sound(stage, parts, params())
    stage.submit(task("x", parts[0], params()))
    ran = Ran()
    for part in parts[1:]:
        for _ in range(num_steps):
            for event in stage.step():
                if isinstance(event, StageRows):
                    ran.rows.setdefault("x", []).append(event)
            stage.check_integrity()
        if num_steps == 30:
            assert stage.activity() is Activity.IDLE, "it waits for the next chunk"
        stage.feed("x", "codes", part)
    run(stage, ran)
    assert_near(torch.cat([event.rows for event in ran.rows["x"]]).T, expected, 1e-5)


def test_chunks_share_steps_with_each_other_and_with_other_requests(folder: Path) -> None:
    stage = stage_of(folder)
    first, second = (chunks(codes(30, seed), 10, 10, 6, 3) for seed in (1, 2))
    alone = [streamed_sound(stage, parts, params(3, seed=7)) for parts in (first, second)]
    plain = sound(stage, codes(13, 5), params(2, 0.0))
    stage.submit(task("a", first[0], params(3, seed=7)))
    stage.submit(task("c", codes(13, 5), params(2, 0.0)))
    stage.feed("a", "codes", first[1])
    stage.submit(task("b", second[0], params(3, seed=7)))
    progress = [(e.request_id, e.step) for e in stage.step() if isinstance(e, StageProgress)]
    assert progress == [("a", 1), ("c", 1), ("a", 2), ("b", 1)], "step 1 of a's second chunk is its second of all"
    for part in second[1:]:
        stage.feed("b", "codes", part)
    for part in first[2:]:
        stage.feed("a", "codes", part)
    ran = run(stage)
    for key, expected in zip("ab", alone, strict=True):
        assert_near(torch.cat([event.rows for event in ran.rows[key]]).T, expected, 1e-5)
    assert_near(ran.sound("c")[0], plain, 1e-5)


def test_the_order_of_rows_holds_under_a_tight_budget(folder: Path) -> None:
    parts = chunks(codes(40), 3, 12, 6, 6)
    expected = streamed_sound(stage_of(folder), parts, params())
    assert_near(streamed_sound(stage_of(folder, max_batch_tokens=60), parts, params()), expected, 1e-5)


def test_a_pause_begins_no_chunk_and_a_resume_goes_on(folder: Path) -> None:
    stage, parts = stage_of(folder), chunks(codes(30), 10, 10, 6, 3)
    expected = streamed_sound(stage, parts, params())
    stage.submit(task("x", parts[0], params()))
    stage.step()
    stage.pause("x")
    for part in parts[1:]:
        stage.feed("x", "codes", part)
    ran = run(stage)
    assert len(ran.rows["x"]) == 1 and ran.consumed["x"] == 1 and not isinstance(ran.last["x"], StageDone)
    assert stage.activity() is Activity.IDLE and stage.get_stats()["running"] == 1
    stage.resume("x")
    run(stage, ran)
    assert torch.equal(torch.cat([event.rows for event in ran.rows["x"]]).T, ran.sound("x")[0])
    assert_near(ran.sound("x")[0], expected, 1e-5)


def test_chunks_that_come_before_the_preparation_wait_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tasks read media; the second one is prepared a step later, and so do its chunks begin."""
    stage, parts = stage_of(folder), chunks(codes(30), 10, 10, 6, 3)
    expected = streamed_sound(stage, parts, params())
    monkeypatch.setattr(stage.model, "is_heavy", lambda inputs, params: True)
    for key in "xy":
        stage.submit(task(key, parts[0], params()))
    for part in parts[1:]:
        for key in "xy":
            stage.feed(key, "codes", part)
    ran = Ran()
    begun = [{event.request_id for event in stage.step() if isinstance(event, StageProgress)} for _ in range(2)]
    assert begun == [{"x"}, {"x", "y"}]
    run(stage, ran)
    for key in "xy":
        assert_near(torch.cat([event.rows for event in ran.rows[key]]).T, expected, 1e-5)


def test_a_paused_task_keeps_its_chunks_and_an_abort_frees_them(folder: Path) -> None:
    stage, parts = stage_of(folder), chunks(codes(30), 10, 10, 6, 3)
    stage.submit(task("x", parts[0], params()))
    stage.pause("x")
    assert stage.activity() is Activity.IDLE and stage.step() == []
    stage.feed("x", "codes", parts[1])
    stage.resume("x")
    assert stage.activity() is Activity.BUSY
    stage.pause("x")
    stage.abort("x")
    stage.resume("x")
    assert stage.activity() is Activity.IDLE and stage.get_stats()["running"] == 0


def test_an_empty_last_chunk_ends_a_stream(folder: Path) -> None:
    stage, rows = stage_of(folder), codes(12)
    stage.submit(task("x", StreamChunk(rows), params()))
    ran = run(stage)
    assert not isinstance(ran.last["x"], StageDone)
    stage.feed("x", "codes", StreamChunk(rows[9:], start=12, num_before=3, is_last=True))
    run(stage, ran)
    assert ran.consumed["x"] == 2 and torch.equal(ran.rows["x"][0].rows.T, ran.sound("x")[0])


def test_streams_that_break_the_contract_fail_with_what_was_wrong(folder: Path) -> None:
    rows = codes(12)
    opening = StreamChunk(rows[:6])
    boundless = StreamChunk(rows[:8], start=6, num_before=7)
    overlapping = StreamChunk(rows[:2], start=6, num_before=2, num_after=1)
    high = StreamChunk(torch.tensor([70, 1]), start=6)
    rest = StreamChunk(rows[6:], start=6, is_last=True)
    for feeds, words in (
        ([boundless], "with 7 before and 0 behind them"),
        ([overlapping], "got the rows 6 to 5"),
        ([high], "expected 0 to 59"),
        ([rest, StreamChunk(rows[:1], start=12)], "none after the last one"),
    ):
        stage = stage_of(folder)
        stage.submit(task("x", opening, params()))
        for part in feeds:
            stage.feed("x", "codes", part)
        event = run(stage).last["x"]
        assert isinstance(event, StageFailed) and words in str(event.error), event
        assert stage.get_stats()["running"] == 0
    stage = stage_of(folder)
    stage.submit(replace(task("x", opening, params()), inputs={"codes": rows}))
    event = run(stage).last["x"]
    assert isinstance(event, StageFailed) and "got Tensor, expected a StreamChunk" in str(event.error)


def test_codes_that_come_to_nothing_are_audio_of_no_length(folder: Path) -> None:
    for value, num_outputs in ((params(), 1), (params(num_outputs=2), 2)):
        stage = stage_of(folder, streamed=())
        stage.submit(task("x", StreamChunk(codes(0), is_last=True), value))
        assert run(stage).sound("x").shape == (num_outputs, 1, 0)
        assert stage.get_stats()["running"] == 0


def test_several_outputs_are_refused_where_something_is_streamed(folder: Path) -> None:
    stage, value = stage_of(folder, streamed=()), params(num_outputs=2)
    stage.submit(task("x", StreamChunk(codes(6)), value))
    event = run(stage).last["x"]
    assert isinstance(event, StageFailed) and isinstance(event.error, InvalidRequestError)
    stage.submit(task("whole", codes(6), value))
    assert run(stage).sound("whole").shape[0] == 2
    with pytest.raises(InvalidRequestError, match="num_outputs: got 2"):
        stage_of(folder).spec.check(task("x", codes(6), value).request, value, ReadPorts(streamed=frozenset(STREAMED)))


def test_feeding_what_is_gone_is_fine_and_another_port_is_not(folder: Path) -> None:
    stage = stage_of(folder)
    stage.feed("gone", "codes", StreamChunk(codes(3)))
    stage.pause("gone")
    stage.resume("gone")
    assert stage.activity() is Activity.IDLE
    with pytest.raises(StageError, match="'mel' is not streamed"):
        stage.feed("gone", "mel", StreamChunk(codes(3)))


def test_a_finished_chunk_frees_its_step_cache(folder: Path) -> None:
    stage, parts = stage_of(folder, policy="first_block", threshold=0.1), chunks(codes(20), 10, 10, 6, 0)
    stage.submit(task("x", parts[0], params()))
    stage.step()
    assert stage.get_stats()["step_cache_used_bytes"] > 0
    run(stage)
    assert stage.get_stats()["step_cache_used_bytes"] == 0 and stage.get_stats()["running"] == 1


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9)),
        max_size=30,
    )
)
def test_random_operations_leak_nothing(folder: Path, operations: list[tuple[str, int]]) -> None:
    stage = stage_of(folder, policy="first_block", threshold=0.2, max_batch_tokens=80)
    queued: dict[str, list[StreamChunk]] = {}
    ended: list[str] = []
    for number, (operation, which) in enumerate(operations):
        key = sorted(queued)[which % len(queued)] if queued else ""
        if operation == "add":
            first, *queued[f"{number}"] = chunks(codes(3 + 2 * which, which), 2 + which, 4, 5, 2)
            stage.submit(task(f"{number}", first, params(2, seed=which)))
        elif operation == "step":
            events = stage.step()
            ended += [e.request_id for e in events if isinstance(e, StageDone | StageFailed)]
        elif key and operation == "feed" and queued[key]:
            stage.feed(key, "codes", queued[key].pop(0))
        elif key and operation == "abort":
            stage.abort(key)
            del queued[key]
        elif key and operation in ("pause", "resume"):
            stage.pause(key) if operation == "pause" else stage.resume(key)
        stage.check_integrity()
    for key, rest in queued.items():
        stage.resume(key)
        for part in rest:
            stage.feed(key, "codes", part)
    ended += [key for key, event in run(stage).last.items() if isinstance(event, StageDone)]
    assert len(ended) == len(set(ended)) and set(queued) <= set(ended)
    assert stage.get_stats()["running"] == 0 and stage.get_stats()["step_cache_used_bytes"] == 0
