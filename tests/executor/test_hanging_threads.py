"""Stages in threads of their own that hang, end or break: the loop never waits for them, and they are rebuilt."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.driver import Driver
from support.loop import request
from support.toy_engine import TextEngine, TextParams, Work, toy_config, toy_stage

from vllm_omni.engine.base import Activity, EngineContext, StageSpec
from vllm_omni.errors import StageError, StageUnavailableError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.recovery import FIRST_PAUSE_S
from vllm_omni.messages import StageTask
from vllm_omni.request import RequestStatus
from vllm_omni.worker.background import BackgroundJob

PATIENCE_S = 0.4
A_MOMENT_S = 0.35  # the most that one step of the loop may take on a machine that others use too


@pytest.fixture(autouse=True)
def released() -> Iterator[threading.Event]:
    """Lets blocked threads go at the end of a test."""
    TextEngine.released.clear()
    yield TextEngine.released
    TextEngine.released.set()


def two_stages(**options: Any) -> OmniExecutor:
    """text_a and text_b, each in a thread of its own; requests use both."""
    stages = {name: toy_stage(name, "toy_text", executor="thread", **options) for name in ("text_a", "text_b")}
    return OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text_a", "text_b"), worker_timeout=PATIENCE_S)))


def one_stage(**options: Any) -> OmniExecutor:
    stages = {"text": toy_stage("text", "toy_text", executor="thread", **options)}
    return OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text",), worker_timeout=PATIENCE_S)))


def test_a_step_that_hangs_fails_its_tasks_in_time_and_the_stage_is_rebuilt_in_a_new_thread(
    released: threading.Event,
) -> None:
    loop = one_stage(step_s=0.01)
    driver = Driver(loop)
    first = loop._stages["text"].hosts[0].executor
    loop.add_request(request("mate", params=TextParams(steps=1000)))
    begin = time.monotonic()
    output = driver.answer(request("stuck", params=TextParams(do="block")))
    assert time.monotonic() - begin < PATIENCE_S + 1.0
    driver.until(lambda: driver.final("mate") is not None)
    for found in (output, driver.final("mate")):
        assert found is not None and found.status is RequestStatus.FAILED and isinstance(found.error, StageError)
        assert "no progress for" in str(found.error) and "worker_timeout_s" in str(found.error)
    refused = driver.answer(request("too soon"))
    assert isinstance(refused.error, StageUnavailableError) and refused.error.retry_after_s > 0
    driver.until_ready("text")
    assert driver.answer(request("next", "x")).text == "xx"
    assert (
        loop._stages["text"].hosts[0].executor is not first and loop.get_status()["stages"]["text"]["num_rebuilds"] == 1
    )
    assert driver.longest_s < A_MOMENT_S
    # what the first one reports later is dropped
    released.set()
    assert Driver(loop).answer(request("mate", "y")).text == "yy"
    loop.check_integrity()
    loop.shutdown()


def test_other_stages_go_on_while_one_hangs() -> None:
    loop = two_stages(step_s=0.005)
    driver = Driver(loop)
    loop.add_request(request("stuck", params={"text_a": TextParams(do="block")}), stream=True)
    driver.until(lambda: any(output.results.get("text_b") for output in driver.outputs))
    stuck = driver.answer(request("other", params={"text_b": TextParams(steps=3)}))
    assert "'text_a' failed: no progress" in str(stuck.error) and stuck.results["text_b"].completions[0].text
    assert driver.longest_s < A_MOMENT_S
    loop.shutdown()


def test_loading_again_does_not_block_the_loop() -> None:
    stages = {
        "text_a": toy_stage("text_a", "toy_text", executor="thread", load_s=1.0),
        "text_b": toy_stage("text_b", "toy_text", executor="thread"),
    }
    config = toy_config(stages=stages, outputs=("text_a", "text_b"), worker_timeout=PATIENCE_S)
    loop = OmniExecutor(Pipeline(config))
    driver = Driver(loop)
    for name in ("one", "two"):
        assert driver.answer(request(name, params={"text_a": TextParams(do="raise")})).error is not None
    driver.longest_s = 0.0
    driver.until(lambda: loop.get_status()["stages"]["text_a"]["num_rebuilds"] == 1)
    begin = time.monotonic()
    refused = driver.answer(request("meanwhile"))
    assert isinstance(refused.error, StageUnavailableError) and "'text_a' is being rebuilt" in str(refused.error)
    driver.until_ready("text_a")
    assert time.monotonic() - begin > 0.5 and driver.longest_s < A_MOMENT_S
    assert driver.answer(request("after")).error is None
    loop.shutdown()


def test_a_thread_that_ends_is_noticed_at_once_and_replaced() -> None:
    loop = one_stage()
    driver = Driver(loop)
    begin = time.monotonic()
    output = driver.answer(request("leaves", params=TextParams(do="exit")))
    assert "its thread was ended by SystemExit: leaving" in str(output.error)
    assert time.monotonic() - begin < FIRST_PAUSE_S + PATIENCE_S, "twice: it is run again after the pause"
    driver.until_ready("text")
    assert driver.answer(request("next", "x")).text == "xx"
    loop.shutdown()


def test_an_engine_that_cannot_drop_a_task_is_replaced_and_its_mates_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = one_stage(step_s=0.01)
    driver = Driver(loop)
    loop.add_request(request("mate", "m", params=TextParams(steps=30)))
    loop.add_request(request("a", params=TextParams(steps=1000)))
    driver.until(lambda: len(loop._stages["text"].tasks) == 2)

    def broken(engine: TextEngine, request_id: str) -> None:
        raise LookupError("which one?")

    monkeypatch.setattr(TextEngine, "abort", broken)
    loop.abort("a")
    driver.until(lambda: driver.final("mate") is not None)
    mate = driver.final("mate")
    assert mate is not None and mate.text == 30 * "m" and mate.metrics["text"]["retried"] == 1
    driver.until_ready("text")
    assert driver.answer(request("next", "x")).text == "xx"
    loop.shutdown()


def test_a_stuck_stage_keeps_nobody_from_aborting_asking_and_shutting_down(released: threading.Event) -> None:
    loop = one_stage()
    driver = Driver(loop)
    for index in range(20):
        loop.add_request(request(f"r{index}", params=TextParams(do="block")), stream=True)
    driver.until(lambda: any(output.results for output in driver.outputs))
    time.sleep(0.05)
    begin = time.monotonic()
    for index in range(19):
        loop.abort(f"r{index}")
    loop.get_metrics()
    assert time.monotonic() - begin < A_MOMENT_S
    aborted = [output for output in loop.take_outputs() if output.finished]
    assert len(aborted) == 19 and {output.finish_reason for output in aborted} <= {"abort", None}
    driver.until(lambda: driver.final("r19") is not None)
    begin = time.monotonic()
    loop.shutdown()
    assert time.monotonic() - begin < A_MOMENT_S, "nobody waits for a thread that was left behind"


def test_a_stage_that_hangs_on_a_task_that_is_gone_is_rebuilt_unasked() -> None:
    driver = Driver(one_stage())
    driver.loop.add_request(request("gone", params=TextParams(do="block")))
    driver.until(lambda: driver.loop.get_status()["stages"]["text"]["tasks"] == 1)
    for _ in range(50):  # it is in the step by then
        driver.outputs += driver.loop.step()
        time.sleep(0.001)
    driver.loop.abort("gone")
    assert driver.loop.is_mending
    states = []

    def is_mended() -> bool:
        states.append(driver.loop.get_status()["stages"]["text"]["state"])
        return not driver.loop.is_mending

    driver.until(is_mended)
    assert "rebuilding" in states and driver.loop.get_status()["stages"]["text"]["num_rebuilds"] == 1
    assert driver.answer(request("next")).error is None
    driver.loop.shutdown()


def test_a_stage_that_hangs_is_replaced_though_nobody_waits_as_long_as_that() -> None:
    loop = one_stage()
    driver = Driver(loop)
    hurried = {"timeout_s": PATIENCE_S / 3, "params": TextParams(do="block")}
    for number in range(3):
        assert driver.answer(request(f"r{number}", **hurried)).error is not None
        time.sleep(PATIENCE_S / 6)
    driver.answer(request("last"))
    driver.until(
        lambda: not loop.get_status()["stages"]["text"]["alive"] or loop._stages["text"].hosts[0]._recovery.num_rebuilds
    )
    driver.until_ready("text")
    assert driver.answer(request("next", "x")).text == "xx"
    loop.shutdown()


def test_what_a_stream_had_given_stands_when_its_stage_is_stuck() -> None:
    loop = one_stage()
    driver = Driver(loop)
    output = driver.answer(request("stuck", "ab", params=TextParams(do="block")), stream=True)
    given = "".join(part.text or "" for part in driver.outputs if not part.finished)
    assert output.error is not None and output.text == given == "ab" and output.finish_reason == "error"
    loop.shutdown()


def test_the_executor_of_a_stage_that_is_rebuilt_is_the_configured_one() -> None:
    loop = one_stage()
    driver = Driver(loop)
    assert dataclasses.asdict(loop._pipeline.specs["text"].stage)["executor"] == "thread"
    for name in ("one", "two"):
        driver.answer(request(name, params=TextParams(do="raise")))
    driver.until_ready("text")
    assert type(loop._stages["text"].hosts[0].executor).__name__ == "ThreadExecutor"
    loop.shutdown()


@pytest.mark.parametrize("executor", ["inline", "thread"])
def test_work_beside_a_stage_may_take_longer_than_its_silence(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    """As a film that takes long to decode; also of one task after another."""
    jobs: dict[str, BackgroundJob[None]] = {}
    create, activity = TextEngine.__init__, TextEngine.activity

    def __init__(self: TextEngine, spec: StageSpec, context: EngineContext) -> None:
        create(self, spec, context)
        self.background = context.background

    def submit(self: TextEngine, task: StageTask) -> None:
        self.work[task.request_id] = Work(task)
        jobs[task.request_id] = self.background.begin(lambda stop: time.sleep(2 * PATIENCE_S))

    def is_waiting(self: TextEngine) -> Activity:
        waits = any(not jobs[request_id].is_done for request_id in self.work)
        return Activity.PENDING if waits else activity(self)

    for name, method in (("__init__", __init__), ("submit", submit), ("activity", is_waiting)):
        monkeypatch.setattr(TextEngine, name, method)
    stages = {"text": toy_stage("text", "toy_text", executor=executor)}
    loop = OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text",), worker_timeout=PATIENCE_S)))
    driver = Driver(loop)
    for name in ("a", "b"):
        answered = driver.answer(request(name, "x"))
        assert answered.text == "xx", answered.error
    loop.shutdown()
