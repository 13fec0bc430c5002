"""Whatever an engine, a policy or a receiver does: only the request that it does it to fails, and the loop goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.loop import Clock, answer, engine, executor, finish, request
from support.toy_engine import TextParams, text_config

from vllm_omni import OmniOutput, RequestStatus, registry
from vllm_omni.config.schema import SchedulerConfig
from vllm_omni.engine.boundary import stage_error
from vllm_omni.errors import RequestTimeoutError, SchedulerError, StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.messages import StageDone, StageFailed, StageProgress, StageRows, StageWorked
from vllm_omni.payload import StagePayload

NONSENSE: dict[str, Any] = {
    "metrics that are none": StageDone(StagePayload("bad", "text"), None),  # type: ignore[arg-type]
    "no payload": StageDone(StagePayload("bad", "text", None, None), {}),  # type: ignore[arg-type]
    "completions that are none": StageDone(StagePayload("bad", "text", {}, {"completions": 7}), {}),
    "rows that are none": StageRows("bad", "states", None),  # type: ignore[arg-type]
    "rows of an unknown port": StageRows("bad", "nothing", torch.zeros(2, 2)),
    "a step that is no number": StageProgress("bad", "x", None, 5),  # type: ignore[arg-type]
    "a failure without an error": StageFailed("bad", "it broke"),  # type: ignore[arg-type]
}


def outputs_with(loop: OmniExecutor, event: Any) -> dict[str, OmniOutput]:
    """The answers to one request that the event is about and to two others, streamed."""
    toy = engine(loop, "text")
    step = toy.step

    def misbehaving() -> list[Any]:
        events = [found for found in step() if found.request_id != "bad"]
        return [event, *events] if "bad" in toy.work else events

    toy.step = misbehaving
    for name in ("good", "bad", "other"):
        loop.add_request(request(name, "x", params=TextParams(steps=3)), stream=True)
    return finish(loop)


@pytest.mark.parametrize("event", NONSENSE.values(), ids=NONSENSE)
def test_an_event_that_makes_no_sense_fails_its_request_alone(event: Any) -> None:
    loop = executor(text_config(request_timeout=5.0))
    step = engine(loop, "text").step
    found = outputs_with(loop, event)
    assert isinstance(found["bad"].error, (StageError, SchedulerError)) and found["bad"].status is RequestStatus.FAILED
    assert [found[name].text for name in ("good", "other")] == ["xxx", "xxx"]
    loop.check_integrity()
    engine(loop, "text").step = step
    assert answer(loop, request("next", "x")).text == "xx"


class MoodyPolicy:
    """Raises, or picks what does not wait, over requests whose id says so."""

    def __init__(self, config: SchedulerConfig) -> None: ...

    def pick(self, waiting: Any, now: float) -> Any:
        first = min(waiting, key=lambda state: state.order)
        if "raise" in first.request.request_id:
            raise LookupError("no mood")
        return object() if "odd" in first.request.request_id else first


@pytest.mark.parametrize(("name", "why"), [("raise", "LookupError: no mood"), ("odd", "AttributeError")])
def test_a_policy_that_cannot_say_fails_the_oldest_request_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.setitem(registry.TABLES, "scheduling policy", dict(registry.TABLES["scheduling policy"]))
    registry.register("scheduling policy", "moody", f"{__name__}:MoodyPolicy")
    loop = executor(text_config(scheduler=SchedulerConfig(policy="moody", max_running=1)))
    for request_id in ("first", name, "last"):
        loop.add_request(request(request_id, "x"))
    found = finish(loop)
    assert isinstance(found[name].error, SchedulerError) and why in str(found[name].error)
    assert [found[request_id].text for request_id in ("first", "last")] == ["xx", "xx"]
    loop.check_integrity()


def test_a_stage_that_works_on_a_task_without_showing_it_is_not_stuck() -> None:
    clock = Clock()
    loop = OmniExecutor(Pipeline(text_config(worker_timeout=10.0)), clock=clock)
    toy = engine(loop, "text")
    step, toy.step = toy.step, lambda: [StageWorked("r")]
    loop.add_request(request("r", "x"))
    for _ in range(20):
        assert loop.step() == []
        clock.now += 9.0
    toy.step = step
    assert finish(loop)["r"].text == "xx"


def test_a_request_that_nobody_gave_a_deadline_has_none() -> None:
    clock = Clock()
    loop = OmniExecutor(Pipeline(text_config()), clock=clock)
    loop.add_request(request("r", "x"))
    loop.add_request(request("hurried", "x", timeout_s=5.0))
    loop.step()
    clock.now = 1e9
    found = finish(loop)
    assert found["r"].text == "xx" and isinstance(found["hurried"].error, RequestTimeoutError)


def test_an_error_names_its_stage_once() -> None:
    loop = executor(text_config())
    toy = engine(loop, "text")
    named = stage_error("text", RuntimeError("boom"))
    toy.step = lambda: [StageFailed(toy.work.popitem()[0], named)]
    error = answer(loop, request("r", "x")).error
    assert str(error) == "stage 'text' failed: RuntimeError: boom" and isinstance(error.__cause__, RuntimeError)
