"""A request that ends before it is done still gives what was made: texts, the beginning of audio, finished pictures."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.loop import Clock, engine, finish, request
from support.toy_engine import PictureParams, TextParams, text_config, toy_config, toy_stage
from support.toy_sound import speech_config

from vllm_omni import AsyncOmni, DiffusionParams, OmniRequest, SamplingParams
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import OmniConfig
from vllm_omni.errors import RequestAbortedError, RequestTimeoutError, StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, RequestStatus

REASONS = {
    "abort": (RequestStatus.ABORTED, RequestAbortedError),
    "timeout": (RequestStatus.FAILED, RequestTimeoutError),
}
WRITER = load_config(
    {
        "stages": {"thinker": {"kind": "ar", "model": "asset://tiny-speech", "part": "thinker", "device": "cpu"}},
        "outputs": ["thinker"],
    }
)


class Run:
    """One request in a loop whose clock stands still, streamed or not."""

    def __init__(self, config: OmniConfig, given: OmniRequest, stream: bool = True) -> None:
        self.clock = Clock()
        self.loop = OmniExecutor(Pipeline(config), clock=self.clock)
        self.given = given
        self.parts: list[OmniOutput] = []
        self.loop.add_request(dataclasses.replace(given, timeout_s=60.0), stream=stream)

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(3000):
            if condition():
                return
            self.parts += self.loop.step()
            assert not any(part.finished for part in self.parts), self.parts[-1].error
        raise AssertionError("it never came")

    def end(self, how: str) -> OmniOutput:
        """By abort, deadline (`timeout`) or shutdown; nothing is left behind."""
        if how == "abort":
            self.loop.abort(self.given.request_id)
        elif how == "shutdown":
            self.loop.shutdown()
        else:
            self.clock.now = 60.0
            self.parts += self.loop.step()
        self.parts += self.loop.take_outputs()
        (final,) = [part for part in self.parts if part.finished]
        assert not self.loop._outbox.is_watched(final.request_id)
        assert not self.loop.has_work() and self.loop.scheduler.in_flight() == set()
        if how != "shutdown":
            self.loop.check_integrity()
            assert (final.status, type(final.error)) == REASONS[how]
        return final

    def pieces(self) -> list[OmniOutput]:
        return [part for part in self.parts if not part.finished]


# Texts


@pytest.mark.parametrize("how", ["abort", "timeout", "shutdown"])
@pytest.mark.parametrize("stream", [True, False])
def test_every_sample_of_a_text_has_its_words_tokens_and_log_probabilities(how: str, stream: bool) -> None:
    params = {"thinker": SamplingParams(temperature=1.0, seed=3, n=3, ignore_eos=True, max_tokens=50, logprobs=2)}
    run = Run(WRITER, request(prompt="say seven red", params=params), stream)
    jobs = engine(run.loop, "thinker")._jobs
    run.until(lambda: "r" in jobs and all(sample.generation.num_written >= 9 for sample in jobs["r"].samples.values()))
    final = run.end(how)
    reason = "abort" if how == "shutdown" else how
    assert [completion.finish_reason for completion in final.completions] == [reason] * 3
    whole = Run(WRITER, request(prompt="say seven red", params=params)).loop
    (complete,) = finish(whole).values()
    for made, expected in zip(final.completions, complete.completions, strict=True):
        assert len(made.token_ids) == 9 and made.token_ids == expected.token_ids[:9]
        assert made.logprobs is not None and expected.logprobs is not None and made.logprobs == expected.logprobs[:9]
        assert made.text and expected.text.startswith(made.text)
    if stream:
        assert final.text is not None and final.text.startswith("".join(part.text or "" for part in run.pieces()))
    whole.shutdown()


def test_a_sample_that_had_ended_by_itself_keeps_its_own_reason() -> None:
    params = {"thinker": SamplingParams(temperature=4.0, seed=1, n=8, max_tokens=200, min_tokens=1)}
    run = Run(WRITER, request(prompt="say seven", params=params))
    jobs = engine(run.loop, "thinker")._jobs
    run.until(lambda: "r" in jobs and any(s.generation.finish_reason for s in jobs["r"].samples.values()))
    assert {text.finish_reason for text in run.end("abort").completions} == {"stop", "abort"}


def test_a_request_that_has_not_begun_has_nothing() -> None:
    run = Run(text_config(), request())
    final = run.end("abort")
    assert final.text is None and final.results == {} and final.tensors == {}


def test_words_of_a_stage_that_outputs_do_not_list_are_not_given() -> None:
    run = Run(toy_config(), request(params={"encode": TextParams(steps=50)}))
    run.until(lambda: engine(run.loop, "encode").num_steps > 5)
    assert run.end("timeout").results == {}


# Failures


@pytest.mark.parametrize("do", ["fail", "raise", "lose", "no_memory"])
@pytest.mark.parametrize("stream", [True, False])
def test_the_failure_of_a_stage_keeps_the_words_of_another(do: str, stream: bool) -> None:
    params = {"text": TextParams(steps=50), "voice": TextParams(do=do, steps=9)}
    run = Run(speech_config(), request(params=params), stream)
    outputs = finish(run.loop)
    final = outputs["r"]
    assert final.status is RequestStatus.FAILED and isinstance(final.error, StageError)
    assert final.finish_reason == "error" and final.text and set("ab") == set(final.text)


@pytest.mark.parametrize("do", ["raise", "no_memory"])
def test_a_stage_that_raises_tells_what_its_tasks_had_written(do: str) -> None:
    run = Run(text_config(), request(params=TextParams(steps=50, do=do)), stream=False)
    final = finish(run.loop)["r"]
    assert final.finish_reason == "error" and final.text is not None and final.text.startswith("ab")


def test_a_text_that_fails_in_the_middle_keeps_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"thinker": SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=50)}
    run = Run(WRITER, request(prompt="say seven", params=params))
    jobs = engine(run.loop, "thinker")._jobs
    run.until(lambda: "r" in jobs and len(jobs["r"].sequences[0].output_token_ids) == 5)

    def broken(*_: Any) -> Any:
        raise ValueError("not today")

    monkeypatch.setattr(type(jobs["r"]), "record", broken)
    final = finish(run.loop)["r"]
    assert "not today" in str(final.error) and final.finish_reason == "error" and final.text
    assert final.token_ids is not None and len(final.token_ids) >= 5
    run.loop.check_integrity()


def test_a_picture_that_cannot_be_shown_leaves_the_others_words() -> None:
    stages = {
        "text": toy_stage("text", "toy_text"),
        "picture": toy_stage("picture", "toy_picture", {"states": "text.states"}),
    }
    config = toy_config(stages=stages, outputs=("text", "picture"))
    final = finish(Run(config, request(params={"picture": PictureParams(do="bad_image")})).loop)["r"]
    assert final.status is RequestStatus.FAILED and "torch.float32" in str(final.error)
    assert final.text == "abab" and final.finish_reason == "stop" and final.images == []


def test_an_engine_that_cannot_say_loses_nothing_else() -> None:
    run = Run(speech_config(), request(params=TextParams(steps=50)))
    run.until(lambda: engine(run.loop, "text").num_steps >= 4)

    def broken(request_id: str) -> Any:
        raise LookupError("what?")

    engine(run.loop, "text").partial_result = broken
    engine(run.loop, "voice").partial_result = lambda request_id: "nonsense"
    final = run.end("abort")
    given = run.pieces()
    assert final.text == "".join(part.text or "" for part in given) and final.finish_reason == "abort"
    samples = np.concatenate([audio.samples for part in given for audio in part.audios], axis=1)
    assert np.array_equal(final.audios[0].samples, samples)


# Audio and pictures


@pytest.mark.parametrize(("how", "stream"), [("abort", True), ("timeout", False)])
def test_speech_that_is_cut_has_its_words_and_the_audio_so_far(how: str, stream: bool) -> None:
    run = Run(load_config("tiny_speech"), request(prompt="read 3 7 red", params=DiffusionParams(seed=1)), stream)
    voices = engine(run.loop, "token2wav")._jobs
    run.until(lambda: "r" in voices and len(voices["r"].outputs) == 2)
    final = run.end(how)
    assert final.text == "three seven red" and final.finish_reason == "stop", "the thinker was done"
    (whole,) = finish(Run(load_config("tiny_speech"), run.given).loop).values()
    (made,), (expected,) = final.audios, whole.audios
    length = made.samples.shape[1]
    assert 0 < length < expected.samples.shape[1] and made.sample_rate == 24_000 and made.start == 0
    np.testing.assert_allclose(made.samples, expected.samples[:, :length], atol=1e-4)
    if stream:
        assert sum(audio.samples.shape[1] for part in run.pieces() for audio in part.audios) == length


@pytest.mark.parametrize("how", ["abort", "timeout"])
def test_pictures_that_are_finished_are_given(how: str) -> None:
    params = DiffusionParams(seed=5, num_outputs=3, num_inference_steps=2)
    config = load_config("tiny_image")
    run = Run(config, request(prompt="a red circle", params=params), stream=False)
    jobs = engine(run.loop, "image")._jobs
    run.until(lambda: "r" in jobs and len(jobs["r"].outputs) == 2)
    final = run.end(how)
    (whole,) = finish(Run(config, run.given).loop).values()
    assert [image.tobytes() for image in final.images] == [image.tobytes() for image in whole.images[:2]]


def test_a_finished_branch_is_whole_when_another_is_cut() -> None:
    stages = {
        "words": toy_stage("words", "toy_text"),
        "picture": toy_stage("picture", "toy_picture", {"states": "words.states"}),
        "story": toy_stage("story", "toy_text"),
    }
    config = toy_config(stages=stages, outputs=("picture", "picture.latents", "story"))
    run = Run(config, request(params={"story": TextParams(steps=500)}))
    run.until(lambda: any(part.images for part in run.parts))
    final = run.end("timeout")
    assert len(final.images) == 1 and final.tensors["picture.latents"].shape == (1, 4)
    assert list(final.results) == ["picture", "story"] and final.finish_reason == "timeout" and final.text


# In threads, and from asyncio


@pytest.mark.parametrize("how", ["abort", "timeout"])
def test_a_stage_in_a_thread_tells_too(how: str) -> None:
    stage = toy_stage("text", "toy_text", executor="thread", step_s=0.005)
    run = Run(
        toy_config(stages={"text": stage}, outputs=("text",)), request(params=TextParams(steps=900)), stream=False
    )
    while not run.loop.get_metrics()["stages"]["text"]["steps"]:
        run.parts += run.loop.step()
        run.loop.wait()
    final = run.end(how)
    assert final.finish_reason == how and final.text is not None and final.text.startswith("ab")
    run.loop.shutdown()


def test_abort_from_asyncio_gives_what_there_was() -> None:
    async def main() -> None:
        async with AsyncOmni(text_config(step_s=0.005)) as omni:
            parts: list[OmniOutput] = []
            async for part in omni.stream(request("r"), TextParams(steps=900)):
                parts.append(part)
                if len(parts) == 5:
                    omni.abort("r")
        final = parts[-1]
        assert final.finished and final.finish_reason == "abort"
        assert final.text is not None and len(final.text) >= len("".join(part.text or "" for part in parts[:-1]))

    asyncio.run(asyncio.wait_for(main(), 20.0))
