"""Streamed edges through the whole loop: what overlaps, what is held back, how a chain ends when one of it fails."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.loop import Clock, answer, engine, finish, paused, request
from support.toy_stream import StreamParams, stream_config, streamed

from vllm_omni.config.schema import OmniConfig
from vllm_omni.errors import RequestTimeoutError, StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, RequestStatus

VOICE = {"codes": streamed("talker.codes", first_chunk=2, chunk=2)}
CHAIN = {"voice": VOICE, "echo": {"codes": streamed("voice.sound")}}
SLOW = {"codes": streamed("talker.codes", chunk=2, max_ahead=4)}


def loop_of(
    stages: Mapping[str, Mapping[str, Any]], *outputs: str, clock: Clock | None = None, **options: Mapping[str, Any]
) -> OmniExecutor:
    config: OmniConfig = stream_config(stages, list(outputs or [f"{list(stages)[-1]}.sound"]), **options)
    return OmniExecutor(Pipeline(config), clock=clock or Clock())


def run(loop: OmniExecutor, **params: StreamParams) -> OmniOutput:
    return answer(loop, request(params=params))


def sound(num_rows: int, factor: int = 10) -> torch.Tensor:
    return torch.arange(num_rows)[:, None].expand(-1, 2) * factor


def spans(loop: OmniExecutor, stage: str, name: str = "r") -> list[tuple[int, int]]:
    return [(chunk.start, chunk.stop) for chunk in engine(loop, stage).chunks[name]]


def log(loop: OmniExecutor, stage: str) -> list[str]:
    return [entry for entry, _ in engine(loop, stage).log]


def assert_at_rest(loop: OmniExecutor) -> None:
    loop.check_integrity()
    assert not loop.has_work() and loop.scheduler.in_flight() == set()
    for host in loop._stages.values():
        assert not host.tasks and not host.num_buffers and not engine(loop, host.name).work


# Handing on


def test_the_reader_begins_before_the_writer_is_done_and_the_answer_is_the_whole() -> None:
    loop = loop_of({"voice": VOICE})
    loop.add_request(request())
    for _ in range(2):
        loop.step()
    assert log(loop, "voice") == ["submit"] and engine(loop, "talker").work
    output = finish(loop)["r"]
    assert output.error is None and torch.equal(output.tensors["voice.sound"], sound(6))
    assert spans(loop, "voice") == [(0, 2), (2, 4), (4, 6), (6, 6)]
    assert_at_rest(loop)


def test_a_writer_that_says_which_rows_are_the_last_spares_the_empty_chunk() -> None:
    loop = loop_of({"voice": VOICE})
    assert run(loop, talker=StreamParams(do="ends")).error is None
    assert spans(loop, "voice") == [(0, 2), (2, 4), (4, 6)]


def test_a_chain_of_three_gives_what_whole_edges_give() -> None:
    whole = {"voice": {"codes": "talker.codes"}, "echo": {"codes": "voice.sound"}}
    outputs = [run(loop_of(stages), talker=StreamParams(rows=7)) for stages in (CHAIN, whole)]
    for output in outputs:
        assert output.error is None and torch.equal(output.tensors["echo.sound"], sound(7, 100))


def test_a_whole_payload_is_a_stream_of_one_chunk() -> None:
    loop = loop_of({"voice": {"codes": "talker.codes"}})
    assert run(loop).error is None
    (chunk,) = engine(loop, "voice").chunks["r"]
    assert chunk.is_last and (chunk.start, chunk.stop, chunk.num_before, chunk.num_after) == (0, 6, 0, 0)


def test_one_port_goes_streamed_to_one_reader_and_whole_to_another() -> None:
    stages = {"voice": VOICE, "late": {"codes": "talker.codes"}}
    loop = loop_of(stages, "voice.sound", "late.sound", "talker.codes")
    output = run(loop)
    assert output.error is None and torch.equal(output.tensors["talker.codes"], sound(6, 1))
    assert torch.equal(output.tensors["voice.sound"], output.tensors["late.sound"])
    assert len(spans(loop, "voice")) == 4 and spans(loop, "late") == [(0, 6)]


def test_a_reader_of_the_same_port_streamed_and_whole_starts_at_the_end_and_holds_nobody_back() -> None:
    loop = loop_of({"voice": {**SLOW, "summary": "talker.codes"}})
    output = run(loop, talker=StreamParams(rows=20))
    assert output.error is None and torch.equal(output.tensors["voice.sound"], sound(20))
    assert "pause" not in log(loop, "talker")


def test_rows_that_are_a_chunk_pass_by_reference_all_the_way() -> None:
    loop = loop_of({"voice": {"codes": streamed("talker.codes")}})
    loop.add_request(request())
    for _ in range(3):
        loop.step()
    made = engine(loop, "talker").work["r"].made
    given = [chunk.rows for chunk in engine(loop, "voice").chunks["r"]]
    assert len(given) >= 2 and all(one is other for one, other in zip(made, given, strict=False))


def test_requests_side_by_side_do_not_mix() -> None:
    loop = loop_of(CHAIN)
    for name, num_rows in (("a", 3), ("b", 8), ("c", 1)):
        loop.add_request(request(name, params={"talker": StreamParams(rows=num_rows)}))
    outputs = finish(loop)
    for name, num_rows in (("a", 3), ("b", 8), ("c", 1)):
        assert torch.equal(outputs[name].tensors["echo.sound"], sound(num_rows, 100))
    assert_at_rest(loop)


def test_metrics_say_when_the_first_rows_came_and_what_went_over_every_edge() -> None:
    clock = Clock()
    loop = loop_of({"voice": VOICE, "late": {"codes": "talker.codes"}}, "voice.sound", "late.sound", clock=clock)
    loop.add_request(request())
    loop.step()
    clock.now = 1.5
    output = finish(loop)["r"]
    assert output.metrics["talker"]["first_rows_s"] == 0.0 and output.metrics["voice"]["first_rows_s"] == 0.0
    assert output.metrics["voice"]["started_s"] == 1.5
    edges = loop.get_metrics()["edges"]
    assert edges["talker.codes -> voice.codes"] == {"bytes": 6 * 16, "rows": 6, "chunks": 4}
    assert edges["talker.codes -> late.codes"] == {"bytes": 6 * 16, "rows": 6, "chunks": 1}


def test_what_streams_is_not_cached_and_what_does_not_is() -> None:
    again = {"talker": {"name": "talker"}, "voice": {"name": "voice"}, "late": {"name": "late"}}
    stages = {"voice": VOICE, "late": {"codes": "voice.sound"}}
    loop = loop_of(stages, "late.sound", **again)
    outputs = [answer(loop, request(name)) for name in ("one", "two")]
    assert torch.equal(outputs[0].tensors["late.sound"], outputs[1].tensors["late.sound"])
    assert log(loop, "talker") == log(loop, "voice") == ["submit", "submit"] and log(loop, "late") == ["submit"]


def test_an_update_of_the_configuration_may_name_stages_that_rest() -> None:
    config: OmniConfig = stream_config({"voice": VOICE, "late": {"codes": "talker.codes"}}, ["voice.sound"])
    loop = OmniExecutor(Pipeline(config))
    loop.scheduler.update_config(dataclasses.replace(config, request_timeout=5.0))
    assert loop.scheduler.get_config().request_timeout == 5.0 and "late" not in loop.scheduler.get_config().stages


# Holding back


def test_while_the_first_chunk_is_worked_on_the_writer_waits_and_then_both_go_on_together() -> None:
    loop = loop_of({"voice": VOICE})
    loop.add_request(request(params={"talker": StreamParams(rows=30), "voice": StreamParams(every=5)}))
    talker, voice, made = engine(loop, "talker").work, engine(loop, "voice").work, []
    for _ in range(12):
        loop.step()
        made.append((talker["r"].num_made, voice["r"].num_made if "r" in voice else 0))
    first_sound = next(index for index, (_, sounds) in enumerate(made) if sounds)
    assert [rows for rows, _ in made[:first_sound]] == [1, *[2] * (first_sound - 1)] and first_sound >= 4
    later = made[first_sound:]
    assert [rows for rows, _ in later] == list(range(later[0][0], later[0][0] + len(later)))


def test_a_slow_reader_bounds_what_is_in_flight_and_the_writer_goes_on_when_it_has_caught_up() -> None:
    loop = loop_of({"voice": SLOW})
    loop.add_request(request(params={"talker": StreamParams(rows=30), "voice": StreamParams(every=3)}))
    most, output = 0, None
    while output is None:
        output = next((output for output in loop.step() if output.finished), None)
        loop.check_integrity()
        talker, voice = engine(loop, "talker").work, engine(loop, "voice").work
        if "r" in talker and "r" in voice:
            most = max(most, talker["r"].num_made - voice["r"].num_made)
    assert output.error is None and torch.equal(output.tensors["voice.sound"], sound(30))
    assert most <= 4 + 1  # the row that was made before the pause
    pauses = [entry for entry in log(loop, "talker") if entry != "submit"]
    assert len(pauses) > 4 and pauses == ["pause", "resume"] * (len(pauses) // 2)
    assert_at_rest(loop)


def test_back_pressure_goes_up_the_chain() -> None:
    stages = {"voice": SLOW, "echo": {"codes": streamed("voice.sound", max_ahead=2)}}
    loop = loop_of(stages)
    output = run(loop, talker=StreamParams(rows=40), echo=StreamParams(every=4))
    assert output.error is None and torch.equal(output.tensors["echo.sound"], sound(40, 100))
    assert "pause" in log(loop, "voice") and "pause" in log(loop, "talker")


def test_a_writer_pauses_while_any_of_its_readers_is_full() -> None:
    stages = {"fast": {"codes": streamed("talker.codes")}, "voice": SLOW}
    loop = loop_of(stages, "fast.sound", "voice.sound")
    output = run(loop, talker=StreamParams(rows=20), voice=StreamParams(every=3))
    assert output.error is None and torch.equal(output.tensors["fast.sound"], output.tensors["voice.sound"])
    assert log(loop, "talker").count("pause") >= 4


def test_a_writer_that_does_not_heed_a_pause_loses_nothing() -> None:
    loop = loop_of({"voice": SLOW})
    output = run(loop, talker=StreamParams(rows=20, do="deaf"), voice=StreamParams(every=3))
    assert output.error is None and torch.equal(output.tensors["voice.sound"], sound(20))


# Ends before the end


def test_a_reader_that_is_done_early_lets_its_writer_go_on() -> None:
    loop = loop_of({"voice": SLOW}, "voice.sound", "talker.codes")
    output = run(loop, talker=StreamParams(rows=20), voice=StreamParams(do="leave", every=9))
    assert output.error is None and len(output.tensors["voice.sound"]) == 3
    assert torch.equal(output.tensors["talker.codes"], sound(20, 1))
    assert log(loop, "talker") == ["submit", "pause", "resume"]
    assert_at_rest(loop)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"talker": StreamParams(do="fail")}, "'talker' failed: it had to fail"),
        ({"voice": StreamParams(do="fail")}, "'voice' failed: it had to fail"),
        ({"echo": StreamParams(do="fail")}, "'echo' failed: it had to fail"),
        ({"voice": StreamParams(do="raise_feed")}, "'voice' failed: RuntimeError: no more, please"),
        ({"talker": StreamParams(do="after_last")}, "'talker' gave rows of 'codes' after the last"),
        ({"talker": StreamParams(do="misshapen")}, r"talker.codes -> voice.codes: got rows \[3\] .* after \[2\]"),
        ({"talker": StreamParams(do="wrong_port")}, r"'talker' gave rows of 'summary', expected one of \['codes'\]"),
        ({"voice": StreamParams(do="takes_twice")}, "talker.codes -> voice.codes: one more chunk was consumed than"),
        (
            {"voice": StreamParams(do="takes_other")},
            "'voice' consumed a chunk of 'summary', an input that brings it none",
        ),
        ({"voice": StreamParams(do="lose")}, "'voice' failed: the engine has nothing to do, but has not finished"),
    ],
)
def test_a_failure_in_a_chain_ends_all_of_it_and_harms_nobody_else(params: Any, words: str) -> None:
    loop = loop_of(CHAIN)
    loop.add_request(request("bad", params=params))
    loop.add_request(request("good"))
    outputs = finish(loop)
    assert outputs["bad"].status is RequestStatus.FAILED and isinstance(outputs["bad"].error, StageError)
    with pytest.raises(StageError, match=words):
        raise outputs["bad"].error
    assert outputs["good"].error is None and torch.equal(outputs["good"].tensors["echo.sound"], sound(6, 100))
    assert_at_rest(loop)
    assert all(host.is_ready for host in loop._stages.values())


@pytest.mark.parametrize("params", [StreamParams(do="empty"), StreamParams(rows=0), StreamParams(rows=0, do="whole")])
def test_a_port_that_ends_without_a_row_is_one_empty_chunk_all_along_the_chain(params: StreamParams) -> None:
    loop = loop_of(CHAIN)
    output = run(loop, talker=params)
    assert output.error is None and output.tensors["echo.sound"].shape == (0, 2)
    for stage in ("voice", "echo"):
        (chunk,) = engine(loop, stage).chunks["r"]
        assert chunk.is_last and chunk.rows.shape == (0, 2) and (chunk.start, chunk.stop) == (0, 0)
    assert_at_rest(loop)


def test_a_whole_port_without_a_row_is_the_same_empty_chunk() -> None:
    loop = loop_of({"voice": {"codes": "talker.codes"}})
    output = run(loop, talker=StreamParams(rows=0))
    assert output.error is None and output.tensors["voice.sound"].shape == (0, 2)
    (chunk,) = engine(loop, "voice").chunks["r"]
    assert chunk.is_last and chunk.rows.shape == (0, 2)


def test_a_stage_that_raises_at_a_pause_fails_its_request() -> None:
    loop = loop_of({"voice": VOICE, "echo": {"codes": streamed("voice.sound", max_ahead=2)}})
    output = run(loop, voice=StreamParams(do="raise_pause"), echo=StreamParams(every=9))
    assert "'voice' failed: RuntimeError: no rest" in str(output.error)
    assert_at_rest(loop)


@pytest.mark.parametrize("how", ["abort", "timeout", "shutdown"])
def test_a_chain_of_three_ends_within_one_step_and_nothing_is_held(how: str) -> None:
    clock = Clock()
    loop = loop_of(CHAIN, clock=clock)
    loop.add_request(request(timeout_s=5.0, params={"talker": StreamParams(rows=50), "echo": StreamParams(every=5)}))
    for _ in range(20):
        loop.step()
    assert {stage for _, stage in loop.scheduler.in_flight()} == {"talker", "voice", "echo"}
    made = [weakref.ref(rows) for stage in ("talker", "voice") for rows in engine(loop, stage).work["r"].made]
    assert len(made) > 8
    for stage in ("voice", "echo"):
        engine(loop, stage).chunks.clear()
    if how == "abort":
        loop.abort("r")
        outputs = loop.take_outputs()
    elif how == "timeout":
        clock.now = 5.0
        outputs = loop.step()
    else:
        loop.scheduler.shutdown()
        outputs = loop.take_outputs()
    (output,) = [output for output in outputs if output.finished]
    assert output.status is (RequestStatus.FAILED if how == "timeout" else RequestStatus.ABORTED)
    assert_at_rest(loop)
    gc.collect()
    assert [ref for ref in made if ref() is not None] == []


def test_a_payload_may_hold_what_was_not_given_row_by_row() -> None:
    loop = loop_of({"voice": VOICE})
    output = run(loop, talker=StreamParams(do="whole"))
    assert output.error is None and torch.equal(output.tensors["voice.sound"], sound(6))
    assert [span for span in spans(loop, "voice") if span[0] != span[1]] == [(0, 2), (2, 4), (4, 6)]


# Waiting too long


def starving(clock: Clock, **params: StreamParams) -> OmniExecutor:
    """A chain whose writer goes silent after two rows, at work for some steps."""
    stages = {"voice": {"codes": streamed("talker.codes", chunk_timeout_s=8.0)}}
    loop = loop_of({**stages, "echo": {"codes": streamed("voice.sound", chunk_timeout_s=3.0)}}, clock=clock)
    loop.add_request(request(params={"talker": StreamParams(do="idle"), **params}))
    for _ in range(8):
        loop.step()
    return loop


def test_a_reader_that_gets_no_chunk_in_time_ends_the_request_and_names_the_first_edge_that_is_silent() -> None:
    clock = Clock()
    loop = starving(clock)
    clock.now = 7.9
    assert not any(output.finished for output in loop.step())
    clock.now = 8.0
    (output,) = finish(loop).values()
    assert isinstance(output.error, RequestTimeoutError) and output.status is RequestStatus.FAILED
    assert str(output.error).startswith("talker.codes -> voice.codes: no chunk came for 8 s; raise the edge's")
    assert loop.get_metrics()["timed_out"] == 1
    assert_at_rest(loop)


def test_a_reader_that_is_busy_with_a_chunk_does_not_wait() -> None:
    clock = Clock()
    loop = starving(clock, voice=StreamParams(every=100))
    clock.now = 50.0
    assert not any(output.finished for output in loop.step())


def test_waiting_does_not_count_while_the_writer_is_paused() -> None:
    clock = Clock()
    stages = {"fast": {"codes": streamed("talker.codes", chunk_timeout_s=3.0)}, "voice": SLOW}
    loop = loop_of(stages, "fast.sound", "voice.sound", clock=clock)
    loop.add_request(request(params={"talker": StreamParams(rows=9), "voice": StreamParams(every=20)}))
    for _ in range(40):
        loop.step()
    assert paused(loop, "talker") == {"r"}
    clock.now = 100.0
    assert finish(loop)["r"].error is None


def test_a_reader_that_never_takes_ends_with_the_requests_own_deadline() -> None:
    clock = Clock()
    loop = loop_of({"voice": SLOW}, clock=clock)
    loop.add_request(
        request(timeout_s=9.0, params={"talker": StreamParams(rows=99), "voice": StreamParams(do="never_takes")})
    )
    for _ in range(20):
        assert not any(output.finished for output in loop.step())
    assert paused(loop, "talker") == {"r"} and engine(loop, "talker").work["r"].num_made <= 5
    clock.now = 9.0
    (output,) = finish(loop).values()
    assert isinstance(output.error, RequestTimeoutError) and "talker, voice" in str(output.error)
    assert_at_rest(loop)
