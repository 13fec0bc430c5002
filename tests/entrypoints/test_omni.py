from __future__ import annotations

import gc
import io
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.loop import engine
from support.toy_engine import PictureParams, TextParams, register_toys, text_config, toy_config

import vllm_omni
from vllm_omni import Omni, OmniOutput, OmniRequest, RequestStatus
from vllm_omni.config.schema import SchedulerConfig
from vllm_omni.entrypoints.prompts import is_batch
from vllm_omni.errors import ConfigError, InvalidRequestError, QueueFullError, RequestAbortedError, SchedulerError

YAML = """
name: toy
stages:
  encode: {kind: toy_text, weights_bytes: 10}
  picture:
    kind: toy_picture
    inputs: {states: encode.states}
    defaults: {steps: 3}
outputs: [picture]
"""


def text_omni(**changes: Any) -> Omni:
    return Omni(text_config(**changes))


def test_one_prompt_gives_a_list_of_one() -> None:
    with Omni(toy_config()) as omni:
        (output,) = omni.generate("ab", PictureParams(seed=1))
    assert isinstance(output, OmniOutput) and output.images[0].size == (8, 8) and output.text is None


def test_outputs_come_in_the_order_of_the_prompts_whoever_is_done_first() -> None:
    with text_omni() as omni:
        outputs = omni.generate(["a", "b", "c"], [TextParams(steps=9), TextParams(steps=1), TextParams(steps=4)])
    assert [output.text for output in outputs] == ["a" * 9, "b", "c" * 4]


def test_params_may_be_one_for_all_one_for_each_or_by_stage() -> None:
    with Omni(toy_config()) as omni:
        one = omni.generate(["a", "b"], PictureParams(num_outputs=3))
        each = omni.generate(["a", "b"], [PictureParams(num_outputs=2), None])
        by_stage = omni.generate("a", {"picture": PictureParams(num_outputs=2), "encode": TextParams(steps=1)})
    assert [len(output.images) for output in [*one, *each, *by_stage]] == [3, 3, 2, 1, 2]
    assert by_stage[0].metrics["encode"]["steps"] == 1


@pytest.mark.parametrize("prompts", [["a", "b"], "a"])
def test_another_number_of_params_is_raised_at_once(prompts: Any) -> None:
    with text_omni() as omni:
        with pytest.raises(InvalidRequestError, match="got 3 for"):
            omni.generate(prompts, [TextParams()] * 3)
        assert omni.get_metrics()["admitted"] == 0


@pytest.mark.parametrize(
    ("prompts", "is_several"),
    [
        ("hi", False),
        ([1, 2, 3], False),
        ([{"role": "user", "content": "hi"}], False),
        ({"prompt": "hi"}, False),
        (["hi"], True),
        ([[1, 2], [3]], True),
        ([{"prompt": "hi"}], True),
        ([[{"role": "user", "content": "hi"}]], True),
        ([OmniRequest(prompt="hi")], True),
        ([], True),
    ],
)
def test_a_list_of_ids_or_messages_is_one_prompt(prompts: Any, is_several: bool) -> None:
    assert is_batch(prompts) is is_several


def test_no_prompts_give_no_outputs() -> None:
    with text_omni() as omni:
        assert omni.generate([]) == []


def test_a_bad_request_among_good_ones_is_rejected_alone() -> None:
    prompts = ["a", {"promt": "b"}, {"prompt": "c", "request_id": "mine", "timeout_s": -1}, 7, "e"]
    with text_omni() as omni:
        outputs = omni.generate(prompts, [None, None, None, None, TextParams(do="reject")])
    assert [output.status for output in outputs] == [RequestStatus.FINISHED] + [RequestStatus.REJECTED] * 4
    assert all(isinstance(output.error, InvalidRequestError) for output in outputs[1:])
    assert "did you mean 'prompt'" in str(outputs[1].error) and outputs[2].request_id == "mine"


def test_the_later_of_two_equal_ids_is_rejected() -> None:
    with text_omni() as omni:
        prompts = [{"prompt": letter, "request_id": "same"} for letter in "ab"]
        first, second = omni.generate(prompts)
        assert first.text == "aa" and isinstance(second.error, SchedulerError)
        assert omni.generate(prompts[0])[0].text == "aa"


def test_requests_may_be_given_ready_made() -> None:
    ready = OmniRequest(prompt="a", request_id="r", priority="high")
    with text_omni() as omni:
        assert omni.generate(ready, TextParams(steps=1))[0].text == "a"
        own = OmniRequest(prompt="a", params=TextParams(steps=1))
        assert omni.generate([own])[0].text == "a"
        assert isinstance(omni.generate(own, TextParams())[0].error, InvalidRequestError)


def test_more_prompts_than_the_queue_holds_are_fed_gradually() -> None:
    with text_omni(scheduler=SchedulerConfig(max_queue_size=2, max_running=3)) as omni:
        outputs = omni.generate([str(index) for index in range(40)])
        assert [output.text for output in outputs] == [str(index) * 2 for index in range(40)]
        assert engine(omni, "text").max_batch == 3


def test_an_interrupt_aborts_what_the_call_began_and_the_next_call_works() -> None:
    with text_omni() as omni:
        with pytest.raises(KeyboardInterrupt):
            omni.generate(["a", "b", "c"], [TextParams(steps=5), TextParams(do="interrupt"), TextParams(steps=5)])
        assert engine(omni, "text").work == {}
        assert omni.get_metrics()["aborted"] == 3
        omni._executor.check_integrity()
        assert [output.text for output in omni.generate(["x", "y"])] == ["xx", "yy"]


# Streams


def test_a_stream_gives_parts_and_then_exactly_one_final_output() -> None:
    with text_omni() as omni:
        outputs = list(omni.stream("ab", TextParams(steps=3)))
    assert [output.finished for output in outputs] == [False] * 3 + [True]
    assert "".join(output.text or "" for output in outputs[:-1]) == outputs[-1].text == "ababab"


@pytest.mark.parametrize(("prompt", "params"), [({"promt": "x"}, None), ("x", TextParams(do="reject"))])
def test_a_stream_of_a_bad_request_is_one_rejected_output(prompt: Any, params: Any) -> None:
    with text_omni() as omni:
        (output,) = omni.stream(prompt, params)
    assert output.status is RequestStatus.REJECTED


def test_closing_a_stream_early_aborts_its_request_and_frees_its_id() -> None:
    with text_omni() as omni:
        prompt = {"prompt": "a", "request_id": "mine"}
        stream = omni.stream(prompt, TextParams(steps=500))
        next(stream)
        stream.close()
        assert engine(omni, "text").work == {} and omni.get_metrics()["aborted"] == 1
        assert omni.generate(prompt)[0].text == "aa"


def test_a_stream_that_is_closed_late_leaves_a_later_request_of_its_id_alone() -> None:
    with text_omni() as omni:
        prompt = {"prompt": "a", "request_id": "mine"}
        first = omni.stream(prompt, TextParams(steps=2))
        assert [next(first).text, next(first).text] == ["a", "a"]  # the final output came with the second, unread
        second = omni.stream(prompt, TextParams(steps=5))
        next(second)
        first.close()
        assert list(second)[-1].text == "aaaaa"


def test_streams_and_generate_may_interleave() -> None:
    with text_omni() as omni:
        first, second = omni.stream("a", TextParams(steps=4)), omni.stream("b", TextParams(steps=4))
        parts = [next(first), next(second)]
        assert omni.generate("c", TextParams(steps=9))[0].text == "c" * 9
        rest = [list(first), list(second)]
    assert [part.text for part in parts] == ["a", "b"]
    assert [outputs[-1].text for outputs in rest] == ["aaaa", "bbbb"]
    assert [sum(output.finished for output in outputs) for outputs in rest] == [1, 1]


def test_a_stream_that_was_never_begun_costs_nothing() -> None:
    with text_omni() as omni:
        omni.stream("a").close()
        assert omni.get_metrics()["admitted"] == 0


def test_calls_from_several_threads_get_their_own_outputs() -> None:
    results: dict[str, list[str | None]] = {}
    with text_omni() as omni:

        def call(letter: str) -> None:
            results[letter] = [output.text for output in omni.generate([letter] * 20, TextParams(steps=3))]

        threads = [threading.Thread(target=call, args=(letter,)) for letter in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert results == {letter: [letter * 3] * 20 for letter in "abcd"}


# What comes from inside a step: a garbage collector, a signal handler


def at_call(number: int, function: Callable[[], None]) -> Callable[[Any, str, Any], None]:
    """A profiler that calls a function once, in the middle of the `number`-th call inside the package."""
    counter = itertools.count()

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "vllm_omni" in frame.f_code.co_filename and next(counter) == number:
            function()

    return profile


@pytest.mark.parametrize("moments", [range(start, 1200, 80) for start in range(0, 80, 16)])
def test_a_stream_that_is_dropped_at_any_moment_harms_nobody(moments: range) -> None:
    with text_omni() as omni:
        for number, moment in enumerate(moments):
            left = omni.stream("left", TextParams(steps=500))
            next(left)
            sys.setprofile(at_call(moment, left.close))
            try:
                outputs = omni.generate(["a", "b", "c"], TextParams(steps=3))
            finally:
                sys.setprofile(None)
            left.close()  # where the moment never came
            assert [output.text for output in outputs] == ["aaa", "bbb", "ccc"]
            omni._executor.check_integrity()
            assert engine(omni, "text").work == {} and omni.get_metrics()["aborted"] == number + 1


def test_streams_in_cycles_that_the_collector_finds_harm_nobody() -> None:
    thresholds = gc.get_threshold()
    with text_omni() as omni:
        try:
            gc.set_threshold(1, 1, 1)
            for _ in range(20):
                cycle: list[Any] = [omni.stream("left", TextParams(steps=500))]
                next(cycle[0])
                cycle.append(cycle)
                del cycle
                assert [output.text for output in omni.generate(["a", "b"])] == ["aa", "bb"]
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()
        assert omni.get_metrics()["aborted"] == 20 and engine(omni, "text").work == {}


def test_a_call_from_inside_a_step_is_refused_and_closing_waits_for_its_end() -> None:
    with text_omni() as omni:
        refused: list[str] = []

        def call() -> None:
            with pytest.raises(SchedulerError, match="inside a step") as caught:
                omni.generate("x")
            refused.append(str(caught.value))

        toy = engine(omni, "text")
        step = toy.step
        toy.step = lambda: (call(), step())[1]
        assert omni.generate("a")[0].text == "aa" and len(refused) == 2
        toy.step = lambda: (omni.close(), step())[1]
        (output,) = omni.generate("a")
        assert isinstance(output.error, RequestAbortedError)


# Life


def test_after_close_calls_are_refused_and_open_streams_end_aborted() -> None:
    omni = text_omni()
    stream = omni.stream("a", TextParams(steps=100))
    next(stream)
    omni.close()
    omni.close()
    rest = list(stream)
    assert isinstance(rest[-1].error, RequestAbortedError) and [part.finished for part in rest] == [True]
    with pytest.raises(SchedulerError, match="closed"):
        omni.generate("b")
    with pytest.raises(SchedulerError, match="closed"):
        next(omni.stream("b"))
    assert omni.get_metrics()["aborted"] == 1


@pytest.mark.parametrize("do", ["reject", "reject_bug", "fail", "raise"])
def test_a_caller_that_keeps_an_error_keeps_no_engine(do: str) -> None:
    with text_omni() as omni:
        (output,) = omni.generate("a", TextParams(do=do))
        held = weakref.ref(engine(omni, "text"))
    gc.collect()
    assert output.error is not None and held() is None


def test_outputs_lost_to_an_interrupt_are_an_error_and_not_a_hang() -> None:
    omni = text_omni()
    stream = omni.stream("a", TextParams(steps=3))
    next(stream)
    while omni._executor.has_work():
        omni._executor.step()
    with pytest.raises(SchedulerError, match="lost"):
        list(stream)


def test_a_config_may_be_a_file_a_mapping_or_built(tmp_path: Path) -> None:
    register_toys()
    file = tmp_path / "toy.yaml"
    file.write_text(YAML)
    with Omni(config=file, overrides=["picture.defaults.steps=4"], device="cpu", dtype="bfloat16") as omni:
        assert omni.generate("a")[0].metrics["picture"]["steps"] == 4
        assert {stage.dtype for stage in omni.config.stages.values()} == {"bfloat16"}
    stages = {"text": {"kind": "toy_text"}}
    with Omni({"name": "t", "stages": stages, "outputs": ["text"]}) as omni:
        assert omni.generate("a")[0].text == "aa"


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a config nor a model"):
        Omni()
    with pytest.raises(ConfigError, match="OmniConfig with model or overrides"):
        Omni(text_config(), overrides=["text.device=cpu"])
    with pytest.raises(ConfigError, match="gpu"):
        Omni(text_config(), device="gpu")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream_type", "progress", "is_shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_the_bar_shows_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream_type: type[io.StringIO], progress: bool, is_shown: bool
) -> None:
    stderr = stream_type()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("vllm_omni.entrypoints.progress.DELAY_S", 0.0)
    with Omni(text_config(name="toyland"), progress=progress) as omni:
        outputs = omni.generate(["a", "b"], TextParams(steps=50))
    assert [output.text for output in outputs] == ["a" * 50, "b" * 50]
    assert ("toyland" in stderr.getvalue()) is is_shown


def test_public_names_are_there() -> None:
    assert vllm_omni.Omni is Omni
    assert issubclass(QueueFullError, SchedulerError)
