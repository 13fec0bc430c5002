"""Tasks whose engine breaks are run again, and whoever reads what they make does not notice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.loop import Clock, finish, paused, request
from support.reaper import Reaper
from support.toy_engine import TextParams, text_config, toy_config
from support.toy_stream import StreamParams, stream_config, streamed

from vllm_omni.config.schema import OmniConfig
from vllm_omni.errors import RequestTimeoutError, StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.recovery import FIRST_PAUSE_S
from vllm_omni.request import OmniOutput, RequestStatus

SPEECH = {"voice": {"codes": streamed("talker.codes", first_chunk=2, chunk=2, left_context=1, look_ahead=1)}}


def watched(config: OmniConfig, error: type[BaseException] = RuntimeError) -> tuple[OmniExecutor, Reaper, Clock]:
    pipeline, clock = Pipeline(config), Clock()
    reaper = Reaper(pipeline, error)
    return OmniExecutor(pipeline, clock=clock), reaper, clock


def run(loop: OmniExecutor, clock: Clock, max_steps: int = 300) -> list[OmniOutput]:
    """All outputs; time passes while something is rebuilt."""
    outputs: list[OmniOutput] = []
    for _ in range(max_steps):
        outputs += loop.step()
        loop.check_integrity()
        clock.now += 0.1 if loop.is_mending else 0.0
        if not loop.has_work():
            assert all(not stage.tasks and not stage.num_buffers for stage in loop._stages.values())
            return outputs
    raise AssertionError(f"still at work after {max_steps} steps: {loop.get_status()}")


@pytest.mark.parametrize("is_after", [False, True], ids=["before the step", "its events are lost"])
@pytest.mark.parametrize("at", range(5))
def test_streamed_words_go_on_where_they_stopped(at: int, is_after: bool) -> None:
    loop, reaper, clock = watched(text_config())
    reaper.begin({"text": {at}}, after=is_after)
    loop.add_request(request("r", "ab", params=TextParams(steps=5)), stream=True)
    outputs = run(loop, clock)
    assert reaper.num_killed == 1
    *parts, last = outputs
    assert "".join(part.text or "" for part in parts) == last.text == 5 * "ab"
    steps = [part.metrics["text"]["step"] for part in parts if part.metrics]
    assert steps == sorted(set(steps)), "progress never goes back"
    assert last.error is None and last.metrics["text"]["retried"] == 1
    status = loop.get_status()["stages"]["text"]
    assert (status["num_retries"], status["tasks"], status["waiting"]) == (1, 0, 0)


@pytest.mark.parametrize("stage", ["talker", "voice"])
@pytest.mark.parametrize("at", range(0, 10, 2))
def test_every_row_of_a_stream_is_made_once_wherever_writer_or_reader_break(stage: str, at: int) -> None:
    loop, reaper, clock = watched(stream_config(SPEECH, ["talker.codes", "voice.sound"]))
    params = {"talker": StreamParams(rows=9), "voice": StreamParams(every=2)}
    loop.add_request(request("calm", params=params))
    (calm,) = run(loop, clock)
    reaper.begin({stage: {at}}, after=at % 4 == 0)
    loop.add_request(request("shaken", params=params))
    (shaken,) = run(loop, clock)
    assert reaper.num_killed == 1 and shaken.error is None
    assert shaken.metrics[stage]["retried"] == 1
    for name, tensor in calm.tensors.items():
        assert torch.equal(tensor, shaken.tensors[name]), name
    assert calm.tensors["voice.sound"][:, 0].tolist() == [10 * row for row in range(9)]


def test_a_reader_has_consumed_no_chunk_twice_and_its_writer_stays_paused() -> None:
    edge = {"voice": {"codes": streamed("talker.codes", chunk=1, max_ahead=2)}}
    loop, reaper, _ = watched(stream_config(edge, ["voice.sound"]))
    reaper.begin({"talker": {6}, "voice": {9}})
    loop.add_request(request("r", params={"talker": StreamParams(rows=8), "voice": StreamParams(every=4)}))
    seen: set[str] = set()
    outputs: list[OmniOutput] = []
    for _ in range(300):
        outputs += loop.step()
        loop.check_integrity()
        seen |= paused(loop, "talker")
    (output,) = outputs
    assert seen == {"r"} and output.error is None and reaper.num_killed == 2
    assert output.tensors["voice.sound"][:, 0].tolist() == [10 * row for row in range(8)]


def test_a_run_that_tells_something_else_ends_the_request_instead_of_mixing_both() -> None:
    loop, reaper, clock = watched(text_config())
    reaper.begin({"text": {3}})
    engine: Any = loop._stages["text"].hosts[0].executor
    loop.add_request(request("r", "ab", params=TextParams(steps=5)), stream=True)
    for _ in range(4):
        loop.step()
    engine._engine.words = lambda work: "xy"
    *_, last = run(loop, clock)
    assert last.status is RequestStatus.FAILED and "other words than those told before" in str(last.error)
    assert last.text == 3 * "ab", "what was told stays"


def test_what_nobody_saw_may_differ() -> None:
    loop, reaper, clock = watched(text_config())
    reaper.begin({"text": {3}})
    engine: Any = loop._stages["text"].hosts[0].executor
    loop.add_request(request("r", "ab", params=TextParams(steps=5)))
    for _ in range(3):
        loop.step()
    engine._engine.words = lambda work: "xy"
    (last,) = run(loop, clock)
    assert last.error is None and last.metrics["text"]["retried"] == 1


def test_rows_that_another_stage_has_read_must_be_the_same() -> None:
    loop, reaper, clock = watched(stream_config(SPEECH, ["voice.sound"]))
    reaper.begin({"talker": {4}})
    loop.add_request(request("r", params={"talker": StreamParams(rows=9)}))
    for _ in range(4):
        loop.step()
    engine: Any = loop._stages["talker"].hosts[0].executor
    advance = engine._engine.advance

    def other(*given: Any) -> list[Any]:
        events = advance(*given)
        return [dataclasses.replace(each, rows=each.rows + 1) if hasattr(each, "rows") else each for each in events]

    engine._engine.advance = other
    (output,) = run(loop, clock)
    assert isinstance(output.error, StageError) and "'codes' are others than those told before" in str(output.error)


def test_a_task_that_holds_too_much_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.executor.replay.MAX_HELD_BYTES", 3 * 16)  # rows of two int64
    loop, reaper, clock = watched(stream_config(SPEECH, ["voice.sound"]))
    reaper.begin({"talker": {2}})
    loop.add_request(request("few", params={"talker": StreamParams(rows=3)}))
    (few,) = run(loop, clock)
    reaper.begin({"talker": {6}})
    loop.add_request(request("many", params={"talker": StreamParams(rows=9)}))
    (many,) = run(loop, clock)
    assert few.error is None and few.metrics["talker"]["retried"] == 1
    assert isinstance(many.error, StageError) and "killed" in str(many.error)


@pytest.mark.parametrize("num_mates", [0, 5])
def test_a_poisonous_request_ends_and_its_mates_finish(num_mates: int) -> None:
    loop, _, clock = watched(toy_config())
    loop.add_request(request("poison", "p", params={"encode": TextParams(steps=4, do="raise")}))
    for number in range(num_mates):
        loop.add_request(request(str(number), str(number), params={"encode": TextParams(steps=2 + number)}))
    outputs = {output.request_id: output for output in run(loop, clock)}
    poison = outputs.pop("poison")
    assert poison.status is RequestStatus.FAILED and isinstance(poison.error.__cause__, RuntimeError)  # type: ignore[union-attr]
    assert len(outputs) == num_mates and all(output.error is None for output in outputs.values())
    assert loop.get_status()["stages"]["encode"]["state"] == "ready"
    loop.add_request(request("later"))
    assert run(loop, clock)[-1].error is None


def test_a_request_that_waits_for_a_rebuild_ends_at_its_deadline_with_what_it_had() -> None:
    loop, reaper, clock = watched(text_config())
    reaper.begin({"text": {2, 3, 4, 5, 6}})
    loop.add_request(request("poison", "p", params=TextParams(steps=9)))
    assert run(loop, clock)[-1].status is RequestStatus.FAILED
    loop.add_request(request("again", "p", params=TextParams(steps=9)))
    loop.add_request(request("r", "ab", params=TextParams(steps=9), timeout_s=0.3))
    while loop.get_status()["stages"]["text"]["state"] == "ready":
        loop.step()
    assert loop.get_status()["stages"]["text"]["waiting"] == 2
    clock.now += 0.3
    (late,) = loop.step()
    assert isinstance(late.error, RequestTimeoutError) and loop.get_status()["stages"]["text"]["waiting"] == 1
    loop.abort("again")
    assert [output.status for output in loop.take_outputs()] == [RequestStatus.ABORTED]
    loop.check_integrity()
    clock.now += FIRST_PAUSE_S
    loop.add_request(request("next"))
    assert finish(loop)["next"].error is None
