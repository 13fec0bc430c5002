"""The stage `speech_codec`: batches, streams, aborts, pauses, a pool that is too small, broken input."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from support.qwen3_tts import answers, write_speech_tokenizer
from support.speech_codec import Ran, chunks, engine, run, sound, spec, step, task
from torch import Tensor

from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import EdgeConfig, StreamConfig
from vllm_omni.engine.base import Activity
from vllm_omni.errors import ConfigError
from vllm_omni.messages import StageDone, StageRows
from vllm_omni.models.qwen3_tts.codec.engine import CodecEngine
from vllm_omni.payload import StreamChunk
from vllm_omni.worker.model_pool import ModelPool

FRAME = 192


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech_tokenizer(tmp_path_factory.mktemp("speech_tokenizer"))


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


@pytest.fixture
def stage(folder: Path, pool: ModelPool) -> CodecEngine:
    return engine(folder, pool=pool)


def assert_same(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def codes(num_frames: int, seed: int = 0) -> Tensor:
    return torch.randint(64, (num_frames, 16), generator=torch.Generator().manual_seed(seed))


def test_the_stage_gives_the_packages_samples(stage: CodecEngine) -> None:
    given = answers()
    made = sound(stage, torch.from_numpy(given["codec.codes"]))
    assert_same(made, torch.from_numpy(given["codec.waveform"]))


def test_the_first_frame_sounds_at_once_and_the_stream_is_the_whole(stage: CodecEngine) -> None:
    rows = codes(11)
    expected = sound(stage, rows)
    first, *others = chunks(rows, [1, 1, 4])
    stage.submit(task("a", first))
    ran = Ran()
    step(stage, ran)
    assert ran.streamed("a").shape == (FRAME,)
    assert stage.activity() is Activity.IDLE
    for chunk in others:
        stage.feed("a", "codes", chunk)
    run(stage, ran)
    assert_same(ran.streamed("a"), expected)
    assert_same(ran.whole("a"), expected)
    assert ran.consumed == {"a": 4}


def test_a_requests_samples_do_not_depend_on_its_batch(folder: Path, pool: ModelPool) -> None:
    """Random arrivals, chunks, pauses and aborts, in a pool with fewer slots than requests."""
    stage = engine(folder, pool=pool, max_batch_size=3, max_batch_frames=6)
    chance = random.Random(0)
    rows = {f"r{place}": codes(chance.randint(1, 14), place) for place in range(9)}
    alone = {name: sound(engine(folder, pool=pool), given) for name, given in rows.items()}
    waiting = {name: chunks(given, [chance.randint(0, 5) for _ in range(3)]) for name, given in rows.items()}
    fed: dict[str, int] = {}
    ran = Ran()
    aborted: set[str] = set()
    paused: set[str] = set()
    while any(fed.get(name, 0) < len(parts) for name, parts in waiting.items()):
        name = chance.choice(sorted(name for name, parts in waiting.items() if fed.get(name, 0) < len(parts)))
        if name not in fed:
            stage.submit(task(name, waiting[name][0]))
        elif name not in aborted:
            stage.feed(name, "codes", waiting[name][fed[name]])
        fed[name] = fed.get(name, 0) + 1
        if chance.random() < 0.2 and len(aborted) < 2:
            aborted.add(name)
            stage.abort(name)
        if chance.random() < 0.3:
            (stage.resume if name in paused else stage.pause)(name)
            paused ^= {name}
        if chance.random() < 0.7:
            step(stage, ran)
    for name in paused:
        stage.resume(name)
    run(stage, ran)
    assert len(aborted) == 2
    for name in rows.keys() - aborted:
        assert_same(ran.whole(name), alone[name])
        assert_same(ran.streamed(name), alone[name])
        assert ran.consumed[name] == len(waiting[name])
    assert not stage.get_stats()["running"]
    assert stage.get_stats()["free_states"] == 3


def test_rows_with_equally_many_frames_are_one_batch(stage: CodecEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[tuple[int, int]] = []
    plain = stage.decoder.forward

    def counting(given: Tensor, *args: object, **rest: object) -> Tensor:
        batches.append((given.shape[0], given.shape[1]))
        return plain(given, *args, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stage.decoder, "forward", counting)
    for place, num_frames in enumerate((1, 3, 1, 1)):
        stage.submit(task(f"r{place}", StreamChunk(codes(num_frames, place), is_last=True)))
    stage.step()
    assert sorted(batches) == [(1, 3), (3, 1)]


def test_a_long_chunk_is_decoded_in_steps_of_bounded_size(folder: Path, pool: ModelPool) -> None:
    stage = engine(folder, pool=pool, max_batch_frames=4)
    stage.submit(task("a", StreamChunk(codes(10), is_last=True)))
    ran = Ran()
    step(stage, ran)
    assert ran.streamed("a").shape == (4 * FRAME,)
    assert not ran.consumed, "a chunk is consumed when all of it is"
    part = stage.partial_result("a")
    assert part is not None
    assert part.tensors["audio"].shape == (1, 1, 4 * FRAME)
    run(stage, ran)
    done = ran.last["a"]
    assert isinstance(done, StageDone)
    assert done.metrics == {"steps": 3, "frames": 10}
    assert done.payload.meta == {"sample_rate": 24000}


def test_a_request_beyond_the_pool_waits_for_a_state(folder: Path, pool: ModelPool) -> None:
    stage = engine(folder, pool=pool, max_batch_size=1)
    stage.submit(task("a", StreamChunk(codes(1))))
    stage.submit(task("b", StreamChunk(codes(2, 1), is_last=True)))
    stage.submit(task("nothing", StreamChunk(codes(0), is_last=True)))
    ran = run(stage)
    assert set(ran.pieces) == {"a"}
    assert ran.whole("nothing").shape == (0,)
    stage.abort("a")
    assert_same(run(stage, ran).whole("b"), sound(engine(folder, pool=pool), codes(2, 1)))


def test_a_paused_request_makes_nothing_and_goes_on_where_it_was(stage: CodecEngine) -> None:
    rows = codes(4)
    first, last = chunks(rows, [2])
    stage.submit(task("a", first))
    stage.pause("a")
    assert stage.activity() is Activity.IDLE
    assert stage.step() == []
    stage.resume("a")
    stage.feed("a", "codes", last)
    expected = sound(engine(stage.spec.folder), rows)
    assert_same(run(stage).whole("a"), expected)


def test_a_reference_comes_before_and_is_not_heard_and_the_same_one_is_decoded_once(
    folder: Path, pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one without a recording; in chunks of any sizes, whichever port they come over first."""
    stage, reference, rows = engine(folder, pool=pool, max_batch_frames=8), codes(13, 1), codes(5, 2)
    expected = sound(stage, torch.cat((reference, rows)))[len(reference) * FRAME :]
    plain, num_decoded = stage.decoder.forward, list[int]()

    def counting(given: Tensor, *args: object, **rest: object) -> Tensor:
        num_decoded.append(given.shape[0] * given.shape[1])
        return plain(given, *args, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stage.decoder, "forward", counting)
    none = StreamChunk(reference[:0], is_last=True)
    for name, sizes in (("first", [2, 9]), ("again", [])):
        begin, *others = chunks(reference, sizes)
        stage.submit(task(name, StreamChunk(rows[:2]), reference=begin))
        stage.submit(task(f"beside {name}", StreamChunk(rows, is_last=True), reference=none))
        ran = run(stage)
        for chunk in others:
            assert name not in ran.pieces
            stage.feed(name, "reference_codes", chunk)
        stage.feed(name, "codes", StreamChunk(rows[2:], 2, is_last=True))
        run(stage, ran)
        assert_same(ran.streamed(name), expected)
        assert_same(ran.whole(name), expected)
        assert_same(ran.whole(f"beside {name}"), sound(stage, rows))
        assert ran.consumed == {name: 3 + len(others), f"beside {name}": 2}
        done = ran.last[name]
        assert isinstance(done, StageDone) and done.metrics["frames"] == len(rows)
    assert sum(num_decoded) == len(reference) + 6 * len(rows)
    assert stage.get_stats()["free_states"] == 32


def test_what_nobody_reads_is_not_kept(folder: Path, pool: ModelPool) -> None:
    stage = engine(folder, whole=(), streamed=(), pool=pool)
    stage.submit(task("a", StreamChunk(codes(3), is_last=True)))
    ran = run(stage)
    done = ran.last["a"]
    assert isinstance(done, StageDone)
    assert not done.payload.tensors
    assert not ran.pieces


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (torch.full((2, 16), 64), "got values from 64 to 64, expected 0 to 63"),
        (torch.full((2, 16), -1), "got values from -1 to -1"),
        (torch.zeros(2, 15, dtype=torch.int64), r"expected integers \[n, 16\]"),
        (torch.zeros(2, 16), "expected integers"),
        (torch.zeros(32, dtype=torch.int64), "expected integers"),
    ],
)
def test_broken_codes_fail_their_request_alone(stage: CodecEngine, rows: Tensor, complaint: str) -> None:
    stage.submit(task("good", StreamChunk(codes(3), is_last=True)))
    stage.submit(task("first", StreamChunk(rows, is_last=True)))
    stage.submit(task("later", StreamChunk(codes(1))))
    stage.feed("later", "codes", StreamChunk(rows, 1, is_last=True))
    ran = run(stage)
    for name in ("first", "later"):
        assert ran.error(name).startswith("codes: got ")
    assert re.search(complaint, ran.error("first"))
    assert_same(ran.whole("good"), sound(stage, codes(3)))
    assert stage.get_stats()["free_states"] == 32


def test_a_failing_batch_fails_the_guilty_alone(stage: CodecEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, guilty = stage.decoder.forward, codes(1, seed=7)

    def fragile(given: Tensor, *args: object, **rest: object) -> Tensor:
        if bool((given == guilty).all(dim=(1, 2)).any()):
            raise RuntimeError("it cannot be said")
        return plain(given, *args, **rest)  # type: ignore[arg-type]

    expected = sound(stage, codes(1, seed=1))
    monkeypatch.setattr(stage.decoder, "forward", fragile)
    stage.submit(task("bad", StreamChunk(guilty, is_last=True)))
    stage.submit(task("good", StreamChunk(codes(1, seed=1), is_last=True)))
    ran = run(stage)
    assert "it cannot be said" in ran.error("bad")
    assert_same(ran.whole("good"), expected)


def test_rows_carry_the_rate_and_say_which_is_the_last(stage: CodecEngine) -> None:
    stage.submit(task("a", StreamChunk(codes(1))))
    stage.feed("a", "codes", StreamChunk(codes(1), 1, is_last=True))
    rows = [event for event in stage.step() if isinstance(event, StageRows)]
    assert [(len(event.rows), event.is_last, event.meta) for event in rows] == [
        (2 * FRAME, True, {"sample_rate": 24000})
    ]


def test_memory_is_planned_from_headers(folder: Path) -> None:
    small, large = spec(folder, max_batch_size=1).plan_memory(), spec(folder, max_batch_size=5).plan_memory()
    stage = engine(folder, max_batch_size=5)
    held = stage.get_stats()["state_bytes"]
    assert large.kv_pool_bytes == held == 5 * small.kv_pool_bytes
    loaded = sum(parameter.nbytes for parameter in stage.decoder.parameters())
    usage = 16 * 64 * 4  # divided by, and let go of
    assert small.weights_bytes == loaded + usage
    assert spec(folder, dtype="bfloat16").plan_memory().weights_bytes == small.weights_bytes // 2
    assert str(spec(folder).published_dtype()) == "torch.float32"


def test_context_at_the_edge_is_refused(folder: Path) -> None:
    edge = EdgeConfig("talker.codes", stream=StreamConfig(left_context=4))
    with pytest.raises(ConfigError, match=r"left_context: got 4, expected 0: this stage carries its state"):
        spec(folder, edge)


def test_the_kind_is_configured_by_yaml(folder: Path) -> None:
    section = {"kind": "speech_codec", "model": str(folder), "inputs": {"codes": "talker.codes"}}
    with pytest.raises(ConfigError, match="max_batch_size"):
        load_config({"stages": {"speech": section | {"max_batch_size": 0}}, "outputs": ["speech"]})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}', encoding="utf-8")
    with pytest.raises(ConfigError, match="choose the folder speech_tokenizer"):
        spec(tmp_path)
