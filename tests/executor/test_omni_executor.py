from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.loop import Clock, answer, engine, executor, finish, request
from support.toy_engine import PictureParams, TextParams, text_config, toy_config, toy_stage

from vllm_omni.config.schema import DiTCacheConfig, SchedulerConfig
from vllm_omni.errors import (
    RequestTimeoutError,
    SchedulerError,
)
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, RequestStatus


def test_a_request_goes_through_all_its_stages() -> None:
    output = answer(executor(), request(params=PictureParams(seed=5, num_outputs=2)))
    assert output.status is RequestStatus.FINISHED and output.error is None
    assert [(image.size, image.mode, image.getpixel((0, 0))) for image in output.images] == [
        ((8, 8), "RGB", (102, 102, 102))  # the mean of "abab" is 97.5, plus the seed
    ] * 2
    assert output.tensors["picture.latents"].tolist() == [[102.5] * 4] * 2
    assert set(output.metrics) == {"encode", "picture"}
    assert output.metrics["picture"]["steps"] == 2


def test_a_stage_runs_only_for_requests_that_read_it() -> None:
    loop = executor()
    loop.add_request(request("plain"))
    loop.add_request(request("guided", params=PictureParams(guided=True)))
    outputs = finish(loop)
    assert set(outputs["plain"].metrics) == {"encode", "picture"}
    assert set(outputs["guided"].metrics) == {"encode", "guide", "picture"}


def test_stages_interleave() -> None:
    loop = executor()
    loop.add_request(request("slow", params={"picture": PictureParams(steps=50)}))
    for _ in range(5):
        loop.step()
    loop.add_request(request("late", prompt="other", params={"picture": PictureParams(steps=2)}))
    outputs: list[str] = []
    while not outputs:
        outputs = [output.request_id for output in loop.step()]
    assert outputs == ["late"] and engine(loop, "picture").max_batch == 2


def test_an_answer_does_not_depend_on_batch_mates() -> None:
    prompts = ["a", "bb", "", "ccc"]
    alone = [answer(executor(), request(prompt=prompt)).tensors["picture.latents"] for prompt in prompts]
    loop = executor()
    for index, prompt in reversed(list(enumerate(prompts))):
        loop.add_request(request(str(index), prompt))
    crowd = finish(loop)
    assert all(torch.equal(alone[i], crowd[str(i)].tensors["picture.latents"]) for i in range(4))


def test_text_is_given_with_ids_and_finish_reason() -> None:
    output = answer(executor(text_config()), request(params=TextParams(steps=3)))
    assert (output.text, output.finish_reason) == ("ababab", "stop")
    assert output.token_ids == tuple(map(ord, "ababab"))


def test_yaml_defaults_hold_until_the_request_says_otherwise() -> None:
    config = toy_config(stages={"text": toy_stage("text", "toy_text", defaults={"steps": 4})}, outputs=("text",))
    loop = executor(config)
    assert answer(loop, request("default")).text == "ab" * 4
    assert answer(loop, request("own", params=TextParams(steps=1))).text == "ab"


# Abort, deadline, drain, shutdown


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_an_abort_acts_at_once_and_frees_the_engines(num_steps: int) -> None:
    loop = executor()
    loop.add_request(request(params=PictureParams(steps=9, guided=True)))
    for _ in range(num_steps):
        assert loop.step() == []
    loop.abort("r")
    (output,) = loop.take_outputs()
    assert output.status is RequestStatus.ABORTED and not loop.has_work()
    assert all(engine(loop, stage).work == {} for stage in ("encode", "guide", "picture"))
    loop.abort("r")
    loop.abort("unknown")
    assert loop.step() == []
    assert answer(loop, request()).error is None


def test_a_deadline_frees_the_engines() -> None:
    clock, config = Clock(), toy_config()
    loop = OmniExecutor(Pipeline(config), clock=clock)
    loop.add_request(request(timeout_s=3.0, params=PictureParams(steps=99)))
    for _ in range(4):
        assert loop.step() == []
    clock.now = 3.0
    (output,) = loop.step()
    assert isinstance(output.error, RequestTimeoutError) and engine(loop, "picture").work == {}
    assert set(output.metrics) == {"encode"}


def test_stop_drains_and_shutdown_aborts() -> None:
    loop = executor(scheduler=SchedulerConfig(max_running=1))
    loop.add_request(request("a"))
    loop.add_request(request("b"))
    loop.stop()
    with pytest.raises(SchedulerError):
        loop.add_request(request("c"))
    assert {output.status for output in finish(loop).values()} == {RequestStatus.FINISHED}
    loop.scheduler.start()
    loop.add_request(request("d"))
    loop.step()
    loop.shutdown()
    loop.shutdown()
    assert [output.status for output in loop.take_outputs()] == [RequestStatus.ABORTED]


def test_tensors_of_a_finished_request_are_let_go_and_the_callers_are_its_own() -> None:
    others = {id(tensor) for tensor in living_tensors()}
    loop = executor(dit_cache=DiTCacheConfig(prompt_embeds_mb=0))
    output = answer(loop, request())
    latents = weakref.ref(output.tensors["picture.latents"])
    del output
    alive = [tensor for tensor in living_tensors() if id(tensor) not in others]
    assert latents() is None
    assert alive == []


def living_tensors() -> list[torch.Tensor]:
    """Those of the toys' width."""
    gc.collect()
    return [item for item in gc.get_objects() if type(item) is torch.Tensor and item.shape[-1:] == (4,)]


def test_changing_an_outputs_tensor_does_not_change_a_later_answer() -> None:
    stages = {"words": toy_stage("words", "toy_text")}
    loop = executor(toy_config(stages=stages, outputs=("words.states",)))
    answer(loop, request("first")).tensors["words.states"].zero_()
    second = answer(loop, request("second"))
    assert second.metrics["words"]["cached"] is True and second.tensors["words.states"][0, 0] == ord("a")


def test_the_cause_of_a_failure_holds_no_tensors_of_its_frames() -> None:
    loop = executor(text_config())
    made: list[Any] = []

    def step() -> list[Any]:
        tensor = torch.zeros(7)
        made.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    engine(loop, "text").step = step
    output = answer(loop, request())
    gc.collect()
    assert "out of memory" in str(output.error) and made[0]() is None


# The cache of prompt embeddings


def test_the_same_prompt_with_another_seed_skips_its_stage() -> None:
    loop = executor()
    first = answer(loop, request("first", params=PictureParams(seed=1)))
    second = answer(loop, request("second", params=PictureParams(seed=2)))
    assert "cached" not in first.metrics["encode"]
    assert second.metrics["encode"]["cached"] is True and second.metrics["encode"]["steps"] == 0
    assert engine(loop, "encode").num_steps == 2
    fresh = answer(executor(), request(params=PictureParams(seed=2)))
    assert torch.equal(second.tensors["picture.latents"], fresh.tensors["picture.latents"])


def test_a_budget_of_zero_turns_the_cache_off() -> None:
    loop = executor(dit_cache=DiTCacheConfig(prompt_embeds_mb=0))
    for name in ("first", "second"):
        assert "cached" not in answer(loop, request(name)).metrics["encode"]
    assert loop.get_status()["cache_hit_rate"] == 0.0


# Partial outputs


def test_partial_outputs_come_only_where_asked_for_and_add_up_to_the_text() -> None:
    loop = executor(text_config())
    loop.add_request(request("silent", params=TextParams(steps=3)))
    loop.add_request(request("stream", params=TextParams(steps=3)), stream=True)
    outputs: list[OmniOutput] = []
    while loop.has_work():
        outputs += loop.step()
    assert [output.request_id for output in outputs if not output.finished] == ["stream"] * 3
    partial = [output for output in outputs if not output.finished]
    assert all(output.status is RequestStatus.RUNNING for output in partial)
    final = next(output for output in outputs if output.finished and output.request_id == "stream")
    assert "".join(output.text or "" for output in partial) == final.text
    assert partial[1].metrics == {"text": {"step": 2, "num_steps": 3}}
    assert outputs[-1].finished


def test_a_stage_that_is_no_output_shows_progress_but_no_text() -> None:
    loop = executor()
    loop.add_request(request(), stream=True)
    parts = [part for _ in range(20) for part in loop.step() if not part.finished]
    assert {stage for part in parts for stage in part.metrics} == {"encode", "picture"}
    assert all(part.text is None for part in parts)
