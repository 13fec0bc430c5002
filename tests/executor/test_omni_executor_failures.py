from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.loop import Clock, answer, engine, executor, finish, request
from support.toy_engine import PictureParams, TextParams, text_config, toy_config, toy_stage

from vllm_omni.config.schema import SchedulerConfig
from vllm_omni.errors import (
    InvalidRequestError,
    OmniError,
    QueueFullError,
    ResourceError,
    SchedulerError,
    StageError,
)
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.recovery import FIRST_PAUSE_S
from vllm_omni.request import OmniOutput, RequestStatus

# Refusals


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"pictur": PictureParams()}, "did you mean 'picture'"),
        ({"picture": TextParams()}, "expected PictureParams"),
        ({"picture": None}, "got None"),
        (PictureParams(do="reject"), "got 'reject'"),
    ],
)
def test_a_bad_request_is_rejected_before_any_work(params: Any, words: str) -> None:
    loop = executor()
    output = answer(loop, request(params=params))
    assert output.status is RequestStatus.REJECTED and isinstance(output.error, InvalidRequestError)
    assert words in str(output.error)
    assert engine(loop, "encode").num_steps == 0


def test_params_that_no_stage_takes_are_rejected() -> None:
    output = answer(executor(text_config()), request(params=PictureParams()))
    assert isinstance(output.error, InvalidRequestError) and "TextParams" in str(output.error)


def test_an_unknown_priority_and_a_need_that_is_too_large_are_rejected() -> None:
    loop = executor()
    assert isinstance(answer(loop, request(priority="urgent")).error, SchedulerError)
    output = answer(loop, request(params=PictureParams(steps=5000)))
    assert output.status is RequestStatus.REJECTED and isinstance(output.error, ResourceError)


def test_a_bug_in_a_stages_check_rejects_with_its_cause() -> None:
    output = answer(executor(), request(params=PictureParams(do="reject_bug")))
    assert output.status is RequestStatus.REJECTED and isinstance(output.error, StageError)
    assert "'picture'" in str(output.error) and isinstance(output.error.__cause__, KeyError)


def test_a_full_queue_and_an_id_in_use_raise_and_leave_no_output() -> None:
    loop = executor(scheduler=SchedulerConfig(max_queue_size=1))
    loop.add_request(request("a"))
    with pytest.raises(QueueFullError):
        loop.add_request(request("b"))
    with pytest.raises(SchedulerError, match="in use"):
        loop.add_request(request("a"))
    assert set(finish(loop)) == {"a"}


def test_the_id_of_a_rejected_request_is_free_again() -> None:
    loop = executor()
    assert answer(loop, request(params=PictureParams(do="reject"))).error is not None
    assert answer(loop, request()).error is None


# Failures


def test_a_failed_task_fails_its_request_alone() -> None:
    loop = executor()
    loop.add_request(request("good"))
    loop.add_request(request("bad", params={"encode": TextParams(do="fail")}))
    outputs = finish(loop)
    error = outputs["bad"].error
    assert outputs["good"].error is None
    assert outputs["bad"].status is RequestStatus.FAILED and type(error) is StageError
    assert "stage 'encode' failed: it had to fail" in str(error) and isinstance(error.__cause__, InvalidRequestError)


def test_the_failure_of_one_stage_aborts_the_requests_other_stages() -> None:
    loop = executor()
    loop.add_request(request(params={"picture": PictureParams(guided=True), "guide": TextParams(do="fail"),
                                     "encode": TextParams(steps=100)}))  # fmt: skip
    assert finish(loop)["r"].status is RequestStatus.FAILED
    assert engine(loop, "encode").work == {}


def test_an_engine_that_raises_over_a_task_goes_on_and_only_that_task_fails() -> None:
    loop = executor()
    loop.add_request(request("bad", params={"encode": TextParams(do="raise")}))
    loop.add_request(request("mate"))
    outputs = finish(loop)
    bad, mate = outputs["bad"], outputs["mate"]
    assert bad.status is RequestStatus.FAILED and isinstance(bad.error.__cause__, RuntimeError)
    assert mate.error is None and mate.metrics["encode"]["retried"] == 2, "together with it, then apart"
    assert engine(loop, "encode").work == {}
    assert answer(loop, request("later")).error is None


def test_a_finished_task_between_two_raises_keeps_the_stage_alive() -> None:
    loop = executor()
    for index in range(4):
        assert answer(loop, request(f"bad{index}", params={"encode": TextParams(do="raise")})).error is not None
        assert answer(loop, request(f"good{index}", prompt=str(index))).error is None


def test_an_engine_that_cannot_mend_itself_is_given_up_at_once_and_who_waits_for_it_is_run() -> None:
    clock = Clock()
    config = toy_config(scheduler=SchedulerConfig(max_running=1))
    loop = OmniExecutor(Pipeline(config), clock=clock)
    loop.add_request(request("bad", params={"encode": TextParams(do="raise")}))
    loop.add_request(request("waits"))
    loop.step()
    engine(loop, "encode").options = dataclasses.replace(engine(loop, "encode").options, is_broken=True)
    for _ in range(3):
        loop.step()
    assert loop.get_status()["stages"]["encode"]["state"] == "rebuilding"
    clock.now += FIRST_PAUSE_S
    outputs = finish(loop)
    assert outputs["bad"].status is RequestStatus.FAILED and outputs["waits"].error is None


def test_a_task_that_the_engine_lost_fails_instead_of_hanging() -> None:
    output = answer(executor(), request(params={"encode": TextParams(do="lose")}))
    assert output.status is RequestStatus.FAILED and "has not finished this task" in str(output.error)


def test_a_silent_stage_is_given_up_after_worker_timeout() -> None:
    clock, config = Clock(), toy_config(worker_timeout=10.0, request_timeout=1000.0)
    loop = OmniExecutor(Pipeline(config), clock=clock)
    loop.add_request(request(params={"encode": TextParams(do="hang")}))
    for _ in range(9):
        assert loop.step() == []
        clock.now += 1.2
    clock.now += 1.2
    (output,) = loop.step()
    assert output.status is RequestStatus.FAILED and "worker_timeout_s" in str(output.error)
    assert engine(loop, "encode").work == {}
    loop.check_integrity()


def test_the_silence_of_a_stage_that_is_held_back_is_not_its_own() -> None:
    clock, config = Clock(), toy_config(worker_timeout=10.0, request_timeout=1000.0)
    loop = OmniExecutor(Pipeline(config), clock=clock)
    loop.add_request(request(params={"encode": TextParams(do="hang")}))
    loop.step()
    host = loop._stages["encode"].hosts[0]
    for _ in range(3):
        clock.now += 9.0
        host.hold()
        assert loop.step() == []
    clock.now += 10.0
    assert [output.status for output in loop.step()] == [RequestStatus.FAILED]


def test_a_stage_that_reports_each_of_its_long_steps_is_not_silent() -> None:
    clock, config = Clock(), toy_config(worker_timeout=10.0, request_timeout=1000.0)
    loop = OmniExecutor(Pipeline(config), clock=clock)
    loop.add_request(request(params=PictureParams(steps=5)))
    outputs: list[OmniOutput] = []
    while not outputs:
        outputs = loop.step()
        clock.now += 100.0
    assert outputs[0].status is RequestStatus.FINISHED


@pytest.mark.parametrize(("do", "words"), [("no_output", "gave no 'states'"), ("bad_image", "torch.float32")])
def test_a_malformed_payload_fails_its_request_alone(do: str, words: str) -> None:
    params: dict[str, Any] = {"encode": TextParams(do=do)} if do == "no_output" else {"picture": PictureParams(do=do)}
    loop = executor()
    loop.add_request(request("bad", params=params))
    loop.add_request(request("good"))
    outputs = finish(loop)
    assert outputs["good"].error is None
    assert isinstance(outputs["bad"].error, StageError) and words in str(outputs["bad"].error)


def test_a_missing_result_is_an_error_and_not_an_empty_answer() -> None:
    output = answer(executor(), request(params={"picture": PictureParams(do="no_output")}))
    assert output.status is RequestStatus.FAILED and "latents" in str(output.error)


def test_a_failed_request_still_gives_what_it_finished() -> None:
    stages = {
        "text": toy_stage("text", "toy_text"),
        "picture": toy_stage("picture", "toy_picture", {"states": "text.states"}),
    }
    output = answer(
        executor(toy_config(stages=stages, outputs=("text", "picture"))),
        request(params={"picture": PictureParams(do="fail")}),
    )
    assert output.status is RequestStatus.FAILED and output.text == "abab" and output.images == []


# Any mix


deeds = st.sampled_from([None, None, None, "fail", "raise_once", "lose", "reject", "bad_image", "no_output"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(deeds, deeds, st.booleans(), st.integers(1, 4), st.integers(0, 4), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_any_mix_of_ends_gives_one_output_each_and_leaves_nothing(plans: list[Any], max_running: int) -> None:
    loop = executor(scheduler=SchedulerConfig(max_running=max_running, max_queue_size=100))
    outputs: list[OmniOutput] = []
    for index, (encode, picture, guided, steps, pause, is_aborted) in enumerate(plans):
        params = {"encode": TextParams(do=encode, steps=steps), "picture": PictureParams(do=picture, guided=guided)}
        loop.add_request(request(str(index), str(index), params=params))
        for _ in range(pause):
            outputs += loop.step()
            loop.check_integrity()
        if is_aborted:
            loop.abort(str(index))
    outputs += finish(loop).values()
    assert Counter(output.request_id for output in outputs) == Counter(str(index) for index in range(len(plans)))
    for output in outputs:
        assert (output.error is None) == (output.status is RequestStatus.FINISHED)
        assert output.error is None or isinstance(output.error, OmniError)
        assert output.error is not None or isinstance(output.images[0], Image.Image)
    engines = [engine(loop, stage) for stage in ("encode", "guide", "picture")]
    assert all(found is None or found.work == {} for found in engines), "a broken one is let go as a whole"
    assert loop.scheduler.in_flight() == set()
