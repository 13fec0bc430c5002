"""Conditional edges end to end: toy stages through the whole loop, and a tiny random Qwen3 that writes sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import toy_engine
from support.ar import EOS, PROMPT_STATES, make_model_folder, make_stage, make_tokenizer
from support.loop import Clock, answer, engine, executor, finish, request
from support.toy_engine import PictureParams, TextParams, toy_config, toy_stage

from vllm_omni.config.schema import EdgeConfig, OmniConfig, SchedulerConfig, StageConfig
from vllm_omni.errors import ConfigError, InvalidRequestError, RequestTimeoutError, StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.request import OmniOutput, RequestStatus

# Toy stages: `writer` repeats the prompt; what it wrote decides


def branches(**changes: Any) -> OmniConfig:
    """The writer's words decide whether a picture is drawn, words are added, both or neither."""
    stages = [
        toy_stage("writer", "toy_text"),
        toy_stage("encode", "toy_text", {"words": EdgeConfig("writer.text", "'draw' in text")}),
        toy_stage("picture", "toy_picture", {"states": EdgeConfig("writer.states", "'draw' in text")}),
        toy_stage("more_text", "toy_text", {"words": EdgeConfig("writer.text", "'tell' in text")}),
        toy_stage("guided", "toy_picture", {"states": "writer.states", "guide": "encode.states"}),
    ]
    outputs = ("writer", "picture", "picture.latents", "more_text", "guided")
    return toy_config(**{"stages": {stage.name: stage for stage in stages}, "outputs": outputs, **changes})


GUIDED = {"guided": PictureParams(guided=True)}


def test_only_the_branches_that_the_words_ask_for_run() -> None:
    loop = executor(branches())
    for prompt in ("draw", "hello"):
        loop.add_request(request(prompt, prompt))
    outputs = finish(loop)
    drawn, neither = outputs["draw"], outputs["hello"]
    assert drawn.status is neither.status is RequestStatus.FINISHED
    assert set(drawn.results) == {"writer", "picture", "more_text", "guided"} and set(drawn.tensors) == {
        "picture.latents"
    }
    assert len(drawn.results["picture"].images) == 1
    assert set(neither.results) == {"writer", "more_text", "guided"} and neither.tensors == {}
    assert neither.metrics["picture"] == {
        "skipped": True,
        "reason": "writer.states -> picture.states: when ''draw' in text' is false",
    }
    assert engine(loop, "picture").num_steps == 2, "nobody's picture but the first's"


def test_an_optional_input_that_is_not_taken_is_not_there() -> None:
    with_words = answer(executor(branches()), request(prompt="tell"))
    without = answer(executor(branches()), request(prompt="ab"))
    assert with_words.results["more_text"].completions[0].text == "telltelltelltell"
    assert without.results["more_text"].completions[0].text == "abab", "its own prompt, as without the edge"


def test_a_lost_optional_input_of_a_picture_changes_the_picture_and_no_more() -> None:
    loop = executor(branches())
    both = answer(loop, request("both", "draw", params=GUIDED))
    one = answer(loop, request("one", "plain", params=GUIDED))
    plain = answer(loop, request("plain", "plain"))
    assert both.error is one.error is None and "ran_s" in both.metrics["encode"]
    assert one.results["guided"].images[0].tobytes() == plain.results["guided"].images[0].tobytes()


def test_branches_run_side_by_side() -> None:
    loop = executor(branches())
    loop.add_request(request(prompt="draw tell"))
    for _ in range(2):
        loop.step()
    assert {stage for _, stage in loop.scheduler.in_flight()} >= {"picture", "more_text"}
    finish(loop)


def test_the_writers_answer_from_the_prompt_cache_decides_too() -> None:
    loop = executor(branches())
    for name, prompt in (("first", "hello"), ("second", "hello"), ("third", "draw"), ("fourth", "draw")):
        output = answer(loop, request(name, prompt))
        assert output.metrics["picture"].get("skipped", False) is (prompt == "hello")
        assert output.metrics["writer"].get("cached", False) is (name in ("second", "fourth"))


def test_a_failing_branch_fails_its_request_alone_and_stops_the_other() -> None:
    loop = executor(branches())
    params: Mapping[str, StageParams] = {"more_text": TextParams(do="fail"), "picture": PictureParams(steps=50)}
    loop.add_request(request("bad", "draw tell", params=params))
    loop.add_request(request("good", "draw tell"))
    outputs = finish(loop)
    assert outputs["bad"].status is RequestStatus.FAILED and "it had to fail" in str(outputs["bad"].error)
    assert outputs["good"].error is None and engine(loop, "picture").work == {}


def test_a_failure_in_a_skipped_stage_cannot_happen() -> None:
    output = answer(executor(branches()), request(prompt="hello", params={"picture": PictureParams(do="raise")}))
    assert output.error is None


@pytest.mark.parametrize("num_steps", range(6))
def test_an_abort_at_any_moment_leaves_nothing(num_steps: int) -> None:
    loop = executor(branches())
    loop.add_request(request(prompt="draw tell", params=GUIDED))
    ended = [output for _ in range(num_steps) for output in loop.step() if output.finished]
    loop.abort("r")
    assert len([*ended, *loop.take_outputs()]) == 1 and not loop.has_work()
    loop.check_integrity()
    assert all(engine(loop, stage).work == {} for stage in ("writer", "encode", "picture", "more_text", "guided"))


def test_a_deadline_ends_a_request_with_skipped_stages_and_tells_of_them() -> None:
    clock, config = Clock(), branches(scheduler=SchedulerConfig())
    loop = OmniExecutor(Pipeline(config), clock=clock)
    loop.add_request(request(prompt="hello", timeout_s=3.0, params={"guided": PictureParams(steps=99)}))
    for _ in range(4):
        assert loop.step() == []
    clock.now = 3.0
    (output,) = loop.step()
    assert isinstance(output.error, RequestTimeoutError) and output.metrics["picture"]["skipped"] is True


# A tiny random Qwen3 that is made to write given words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


def ar_config(folder: Path, *, when: bool = True, **stages: StageConfig) -> OmniConfig:
    """A thinker with two sections; each is encoded by a stage of its own."""
    everything = {"thinker": make_stage(folder, name="thinker", sections=["scene", "sound"])}
    for label in ("scene", "sound"):
        edge = EdgeConfig(f"thinker.{label}", label if when else None)
        everything[f"{label}_text"] = make_stage(
            folder, name=f"{label}_text", task="encode", inputs={"prompt": edge}, outputs=PROMPT_STATES
        )
    outputs = ("thinker", "scene_text.h", "sound_text.h")
    return OmniConfig(stages={**everything, **stages}, outputs=outputs)


def written(loop: OmniExecutor, words: str, stage: str = "thinker") -> OmniOutput:
    """The answer to a request of which `stage` writes exactly these words and ends."""
    ids = [*make_tokenizer()(words)["input_ids"], EOS]
    first = {ids[0]: 1e6}  # the first token is sampled in the step that submits the task
    loop.add_request(request(params=SamplingParams(temperature=0, max_tokens=len(ids), logit_bias=first)))
    outputs: list[OmniOutput] = []
    while loop.has_work():
        for job in engine(loop, stage)._jobs.values():
            for sample in job.samples.values():
                sample.generation.row._is_never_plain, sample.generation.row.is_plain = True, False
                sample.generation.row._bias = {ids[sample.generation.num_written]: 1e6}
        outputs += loop.step()
        loop.check_integrity()
    (output,) = outputs
    return output


def states(folder: Path, words: str) -> torch.Tensor:
    stage = make_stage(folder, name="text", task="encode", outputs=PROMPT_STATES)
    loop = executor(OmniConfig(stages={"text": stage}, outputs=("text.h",)))
    return answer(loop, request(prompt=words)).tensors["text.h"]


def test_sections_feed_the_branches_that_they_name(folder: Path) -> None:
    loop = executor(ar_config(folder))
    both = written(loop, "scene: a red circle\nsound: the end")
    assert both.text == "scene: a red circle\nsound: the end"
    assert torch.equal(both.tensors["scene_text.h"], states(folder, "a red circle"))
    assert torch.equal(both.tensors["sound_text.h"], states(folder, "the end"))
    one = written(loop, "sound:the end ")
    assert set(one.tensors) == {"sound_text.h"} and one.error is None
    assert one.metrics["scene_text"] == {
        "skipped": True,
        "reason": "thinker.scene -> scene_text.prompt: when 'scene' is false",
    }
    neither = written(loop, "hello")
    assert neither.text == "hello" and neither.tensors == {} and neither.status is RequestStatus.FINISHED
    assert not loop.has_work()


def test_a_section_without_words_is_no_section_to_a_condition(folder: Path) -> None:
    output = written(executor(ar_config(folder)), "scene:\nsound: the end")
    assert set(output.tensors) == {"sound_text.h"} and output.error is None


def test_a_section_that_is_read_but_not_written_fails_with_writer_section_and_fix(folder: Path) -> None:
    output = written(executor(ar_config(folder, when=False)), "scene: a red circle")
    assert output.status is RequestStatus.FAILED and isinstance(output.error, StageError)
    for words in ("stage 'thinker' gave no 'sound'", "stage 'sound_text' reads as 'prompt'", "`when: sound`"):
        assert words in str(output.error)


def test_words_that_a_reader_cannot_take_name_who_wrote_them(folder: Path) -> None:
    output = written(executor(ar_config(folder, when=False)), "scene:\nsound: the end")
    assert output.status is RequestStatus.FAILED
    for words in ("stage 'scene_text' failed", "cannot read what thinker.scene gave", "no tokens"):
        assert words in str(output.error)


def test_several_samples_are_refused_where_sections_feed_others(folder: Path) -> None:
    output = answer(executor(ar_config(folder)), request(params=SamplingParams(n=2)))
    assert output.status is RequestStatus.REJECTED and "n: got 2, expected 1" in str(output.error)
    both = SamplingParams(n=2, max_tokens=3, seed=1)
    words = answer(executor(ar_config(folder)), request(params={"thinker": both}, outputs=["thinker"]))
    assert len(words.completions) == 2, "whoever reads sections does not run for this one"
    alone = OmniConfig(stages={"thinker": make_stage(folder, name="thinker", sections=["scene"])}, outputs=("thinker",))
    many = answer(executor(alone), request(params=SamplingParams(n=2, max_tokens=3, seed=1)))
    assert len(many.completions) == 2


def test_a_condition_on_what_the_writer_never_gives_is_an_error_at_load(folder: Path) -> None:
    edge = EdgeConfig("thinker.scene", "scnee and finish_reason == 'stop'")
    reader = make_stage(folder, name="scene_text", task="encode", inputs={"prompt": edge}, outputs=PROMPT_STATES)
    with pytest.raises(ConfigError, match=r"inputs\.prompt\.when: got 'scnee', .* mean 'scene'"):
        executor(ar_config(folder, scene_text=reader))


def test_a_writer_that_writes_nothing_is_named_and_a_condition_lets_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_engine, "WIDTH", 32)
    toy_engine.register_toys()
    silent = request(params=SamplingParams(logit_bias={EOS: 1e6}))
    outputs = {"h": {"layers": [-1], "tokens": "completion"}}
    for when in (None, "text"):
        stages = [
            make_stage(folder, name="writer", outputs=outputs),
            toy_stage("picture", "toy_picture", {"states": EdgeConfig("writer.h", when)}),
        ]
        config = OmniConfig(stages={stage.name: stage for stage in stages}, outputs=("writer", "picture"))
        output = answer(executor(config), silent)
        if when is None:
            assert "stage 'writer' gave an empty 'h' [0, 32], which stage 'picture' reads" in str(output.error)
        else:
            assert output.error is None and output.text == "" and output.metrics["picture"]["skipped"] is True


# Parameters that nobody reads


@pytest.mark.parametrize("by_stage", [False, True])
def test_sampling_parameters_are_refused_where_no_stage_of_the_request_writes(folder: Path, by_stage: bool) -> None:
    stage = make_stage(folder, name="text", task="encode", outputs=PROMPT_STATES)
    loop = executor(OmniConfig(stages={"text": stage}, outputs=("text.h",)))
    given: list[Any] = [SamplingParams(seed=1, temperature=0.5), SamplingParams()]
    for params in given:
        output = answer(loop, request(params={"text": params} if by_stage else params))
        if params == SamplingParams():
            assert output.error is None
            continue
        assert output.status is RequestStatus.REJECTED and isinstance(output.error, InvalidRequestError)
        assert "got SamplingParams with temperature, seed" in str(output.error)


def test_sampling_parameters_pass_where_one_stage_writes_though_another_encodes(folder: Path) -> None:
    assert written(executor(ar_config(folder)), "scene: a red circle").error is None


def test_defaults_that_an_encoder_would_never_read_are_an_error_at_load(folder: Path) -> None:
    stage = make_stage(folder, name="text", task="encode", outputs=PROMPT_STATES)
    stage = dataclasses.replace(stage, defaults={"temperature": 0.0})
    with pytest.raises(ConfigError, match=r"stages\.text\.defaults: got \['temperature'\], but task encode"):
        executor(OmniConfig(stages={"text": stage}, outputs=("text.h",)))
