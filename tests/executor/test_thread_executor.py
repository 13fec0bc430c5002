"""Stages in threads of their own: the answers, the ends and the failures of stages in one thread, and no waiting."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loop import request
from support.toy_engine import PictureParams, TextParams, text_config, toy_config
from support.toy_stream import StreamParams, stream_config, streamed

from vllm_omni.config.schema import OmniConfig
from vllm_omni.errors import StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, OmniRequest, RequestStatus


def threaded(config: OmniConfig) -> OmniExecutor:
    stages = {name: dataclasses.replace(stage, executor="thread") for name, stage in config.stages.items()}
    return OmniExecutor(Pipeline(dataclasses.replace(config, stages=stages)))


def run(loop: OmniExecutor, *requests: OmniRequest, timeout_s: float = 30.0) -> dict[str, OmniOutput]:
    """All final outputs; the loop sleeps while it has nothing to do."""
    outputs: dict[str, OmniOutput] = {}
    for each in requests:
        loop.add_request(each)
    until = time.monotonic() + timeout_s
    while loop.has_work():
        for output in loop.step():
            if output.finished:
                assert output.request_id not in outputs
                outputs[output.request_id] = output
        loop.wait()
        assert time.monotonic() < until, loop.get_status()
    loop.check_integrity()
    return outputs


def test_answers_are_those_of_one_thread() -> None:
    loop, plain = threaded(toy_config()), OmniExecutor(Pipeline(toy_config()))
    asked = [request(f"r{n}", "ab" * (n + 1), params=PictureParams(seed=n, guided=n % 2 == 0)) for n in range(6)]
    found, expected = run(loop, *asked), run(plain, *asked)
    for name, output in expected.items():
        assert found[name].images[0].tobytes() == output.images[0].tobytes()
    loop.shutdown()


def test_a_stream_passes_between_threads_whole() -> None:
    loop = threaded(
        stream_config({"voice": {"codes": streamed("talker.codes", chunk=3, max_ahead=4)}}, ["voice.sound"])
    )
    (output,) = run(loop, request(params={"talker": StreamParams(rows=20)})).values()
    assert output.error is None and output.tensors["voice.sound"][:, 0].tolist() == [10 * n for n in range(20)]
    loop.shutdown()


def test_stages_work_at_the_same_time_and_the_loop_sleeps_meanwhile() -> None:
    stages = {
        name: dataclasses.replace(text_config(step_s=0.2).stages["text"], name=name) for name in ("text_a", "text_b")
    }
    loop = threaded(text_config(stages=stages, outputs=("text_a", "text_b")))
    loop.add_request(request(params=TextParams(steps=3)))
    begin, num_steps = time.monotonic(), 0
    while loop.has_work():
        loop.step()
        loop.wait()
        num_steps += 1
    assert time.monotonic() - begin < 1.1, "two times 0.6 s one after the other"
    assert num_steps < 60, "it must not spin"
    loop.shutdown()


@pytest.mark.parametrize(
    ("do", "words"),
    [("fail", "it had to fail"), ("raise", "RuntimeError: boom"), ("lose", "has nothing to do"), ("reject", "do: got")],
)
def test_what_goes_wrong_ends_its_request_and_the_stage_goes_on(do: str, words: str) -> None:
    loop = threaded(toy_config())
    (bad,) = run(loop, request("bad", params=PictureParams(do=do))).values()
    assert words in str(bad.error)
    (good,) = run(loop, request("good")).values()
    assert good.status is RequestStatus.FINISHED
    loop.shutdown()


def test_an_order_that_raises_ends_its_task_alone() -> None:
    loop = threaded(stream_config({"voice": {"codes": streamed("talker.codes")}}, ["voice"]))
    bad = request("bad", params={"voice": StreamParams(do="raise_feed")})
    outputs = run(loop, bad, request("good"))
    assert "no more, please" in str(outputs["bad"].error) and outputs["good"].error is None
    loop.shutdown()


def test_nothing_follows_an_abort_and_its_id_can_be_used_at_once() -> None:
    loop = threaded(text_config(step_s=0.01))
    for turn in range(20):
        loop.add_request(request("r", f"{turn} ", params=TextParams(steps=500)))
        loop.step()
        loop.abort("r")
        (aborted,) = [output for output in loop.take_outputs() if output.finished]
        assert aborted.status is RequestStatus.ABORTED
        (output,) = run(loop, request("r", f"{turn} ")).values()
        assert output.text == f"{turn} " * 2
    loop.shutdown()


def test_shutdown_ends_the_threads() -> None:
    before = threading.active_count()
    loop = threaded(toy_config())
    assert threading.active_count() > before
    loop.add_request(request(params=PictureParams(steps=900)))
    loop.step()
    loop.shutdown()
    assert threading.active_count() == before
    assert [output.status for output in loop.take_outputs()] == [RequestStatus.ABORTED]


def test_a_stage_that_was_shut_down_says_so() -> None:
    loop = threaded(text_config())
    host = loop._stages["text"].hosts[0]
    loop.shutdown()
    with pytest.raises(StageError, match="not started, or shut down"):
        host.executor.abort("x")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["", "fail", "lose", "reject", "no_output", "bad_image"]), min_size=1, max_size=8))
def test_any_mix_of_ends_gives_one_output_each(deeds: list[str]) -> None:
    loop = threaded(toy_config())
    asked = [request(f"r{n}", params=PictureParams(do=do or None, seed=n)) for n, do in enumerate(deeds)]
    outputs: dict[str, Any] = run(loop, *asked)
    assert set(outputs) == {each.request_id for each in asked}
    assert all((outputs[f"r{n}"].error is None) == (not do) for n, do in enumerate(deeds))
    loop.shutdown()
