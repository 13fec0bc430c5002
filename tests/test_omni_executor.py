from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_engine import PictureParams, TextEngine, TextParams, text_config, toy_config, toy_stage

from vllm_omni import registry
from vllm_omni.config.graph import build_graph
from vllm_omni.config.schema import DiTCacheConfig, OmniConfig, SchedulerConfig, StageConfig
from vllm_omni.engine.base import EngineContext, MemoryPlan
from vllm_omni.errors import (
    CheckpointError,
    InvalidRequestError,
    OmniError,
    QueueFullError,
    RequestTimeoutError,
    ResourceError,
    SchedulerError,
    StageError,
)
from vllm_omni.executor.inline import InlineExecutor
from vllm_omni.executor.memory import plan_memory, reserve_memory
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.request import OmniOutput, OmniRequest, RequestStatus


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def executor(config: OmniConfig | None = None, **changes: Any) -> OmniExecutor:
    config = config or toy_config(**changes)
    return OmniExecutor(config, build_graph(config))


def request(name: str = "r", prompt: str = "ab", **changes: Any) -> OmniRequest:
    return OmniRequest(prompt=prompt, request_id=name, **changes)


def engine(loop: OmniExecutor, stage: str) -> Any:
    return loop._hosts[stage].executor._engine


def finish(loop: OmniExecutor, max_steps: int = 200) -> dict[str, OmniOutput]:
    """All final outputs; fails when there are two for a request, or when the loop does not come to rest."""
    outputs: dict[str, OmniOutput] = {}
    for _ in range(max_steps):
        for output in loop.step():
            if output.finished:
                assert output.request_id not in outputs
                outputs[output.request_id] = output
        loop.check_integrity()
        if not loop.has_work():
            return outputs
    raise AssertionError(f"still at work after {max_steps} steps: {loop.get_status()}")


def answer(loop: OmniExecutor, given: OmniRequest) -> OmniOutput:
    loop.add_request(given)
    return finish(loop)[given.request_id]


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
    config = toy_config(
        stages={"text": toy_stage("text", "toy_text", defaults={"steps": 4})}, outputs=("text",)
    )
    loop = executor(config)
    assert answer(loop, request("default")).text == "ab" * 4
    assert answer(loop, request("own", params=TextParams(steps=1))).text == "ab"


# Refusals


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"pictur": PictureParams()}, "did you mean 'picture'"),
        ({"picture": TextParams()}, "expected PictureParams"),
        ({"picture": None}, "got None"),
        ("fast", "got str"),
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


def test_an_engine_that_raises_loses_its_tasks_and_goes_on() -> None:
    loop = executor()
    loop.add_request(request("bad", params={"encode": TextParams(do="raise")}))
    loop.add_request(request("mate"))
    outputs = finish(loop)
    for output in outputs.values():
        assert output.status is RequestStatus.FAILED and isinstance(output.error.__cause__, RuntimeError)
    assert engine(loop, "encode").work == {}
    assert answer(loop, request("later")).error is None


def test_an_engine_that_raises_twice_in_a_row_is_dead_and_says_why() -> None:
    loop = executor()
    bad = {"encode": TextParams(do="raise")}
    for name in ("one", "two"):
        assert answer(loop, request(name, params=bad)).status is RequestStatus.FAILED
    output = answer(loop, request("three"))
    assert output.status is RequestStatus.REJECTED and "boom" in str(output.error)
    assert isinstance(output.error.__cause__, RuntimeError)
    assert loop.get_status()["stages"]["encode"] == {"tasks": 0, "alive": False}


def test_a_finished_task_between_two_raises_keeps_the_stage_alive() -> None:
    loop = executor()
    for index in range(4):
        assert answer(loop, request(f"bad{index}", params={"encode": TextParams(do="raise")})).error is not None
        assert answer(loop, request(f"good{index}", prompt=str(index))).error is None


def test_an_engine_that_cannot_mend_itself_is_dead_at_once_and_ends_who_waits_for_it() -> None:
    config = toy_config()
    stages = {**config.stages, "encode": toy_stage("encode", "toy_text")}
    loop = executor(dataclasses.replace(config, stages=stages, scheduler=SchedulerConfig(max_running=1)))
    loop.add_request(request("bad", params={"encode": TextParams(do="raise")}))
    loop.add_request(request("waits"))
    loop.step()
    engine(loop, "encode").options = dataclasses.replace(engine(loop, "encode").options, is_broken=True)
    outputs = finish(loop)
    assert outputs["bad"].status is RequestStatus.FAILED
    assert outputs["waits"].status is RequestStatus.FAILED and "dead" in str(outputs["waits"].error)


def test_a_task_that_the_engine_lost_fails_instead_of_hanging() -> None:
    output = answer(executor(), request(params={"encode": TextParams(do="lose")}))
    assert output.status is RequestStatus.FAILED and "has not finished this task" in str(output.error)


def test_a_silent_stage_is_given_up_after_worker_timeout() -> None:
    clock, config = Clock(), toy_config(worker_timeout=10.0, request_timeout=1000.0)
    loop = OmniExecutor(config, build_graph(config), clock=clock)
    loop.add_request(request(params={"encode": TextParams(do="hang")}))
    for _ in range(9):
        assert loop.step() == []
        clock.now += 1.2
    clock.now += 1.2
    (output,) = loop.step()
    assert output.status is RequestStatus.FAILED and "worker_timeout_s" in str(output.error)
    assert engine(loop, "encode").work == {}
    loop.check_integrity()


def test_one_long_step_is_not_silence() -> None:
    clock, config = Clock(), toy_config(worker_timeout=10.0, request_timeout=1000.0)
    loop = OmniExecutor(config, build_graph(config), clock=clock)
    loop.add_request(request())
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
    loop = OmniExecutor(config, build_graph(config), clock=clock)
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
    loop = executor(dit_cache=DiTCacheConfig(prompt_embeds_mb=0))
    output = answer(loop, request())
    latents = weakref.ref(output.tensors["picture.latents"])
    del output
    gc.collect()
    assert latents() is None
    alive = [item for item in gc.get_objects() if type(item) is torch.Tensor and item.shape[-1:] == (4,)]
    assert alive == []


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


# Loading


def test_memory_is_checked_before_anything_loads() -> None:
    config = toy_config()
    stages = {
        name: dataclasses.replace(stage, options=dataclasses.replace(stage.options, weights_bytes=2**30))
        for name, stage in config.stages.items()
    }
    stages["encode"] = toy_stage("encode", "toy_text", fails_to_load=True, weights_bytes=2**30)
    with pytest.raises(ResourceError) as caught:
        executor(dataclasses.replace(config, stages=stages, max_memory_gb=2.0))
    for words in ("encode 1.00 GiB", "guide 1.00 GiB", "picture 1.00 GiB", "resources.max_memory_gb"):
        assert words in str(caught.value)


def test_stages_of_one_kind_and_folder_count_their_weights_once(tmp_path: Any) -> None:
    shared = {"model": str(tmp_path), "weights_bytes": 1000}
    stages = {
        "a": toy_stage("a", "toy_text", **shared),
        "b": toy_stage("b", "toy_text", **shared),
        "c": dataclasses.replace(toy_stage("c", "toy_text", **shared), dtype="bfloat16"),
    }
    config = toy_config(stages=stages, outputs=("a", "b", "c"))
    plans = plan_memory(config)
    assert [plans[name].weights_bytes for name in "abc"] == [1000, 0, 1000]
    assert reserve_memory(config, plans).used_bytes == 2000 + 64 * 2**20


def test_an_accelerators_share_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.executor.memory.total_memory_bytes", lambda device: 3000)
    config = toy_config(max_gpu_utilization=0.5)
    with pytest.raises(ResourceError, match="max_gpu_utilization"):
        reserve_memory(config, {name: MemoryPlan(weights_bytes=1000) for name in config.stages})


class Untouched(InlineExecutor):
    """Notes who was shut down."""

    shut_down: list[str] = []  # noqa: RUF012

    def shutdown(self) -> None:
        self.shut_down.append(self._stage.name)
        super().shutdown()


def test_a_stage_that_cannot_load_takes_the_loaded_ones_down() -> None:
    registry.register("executor", "untouched", "test_omni_executor:Untouched")
    config = toy_config()
    stages = {name: dataclasses.replace(stage, executor="untouched") for name, stage in config.stages.items()}
    options = dataclasses.replace(stages["picture"].options, fails_to_load=True)
    stages["picture"] = dataclasses.replace(stages["picture"], options=options)
    import test_omni_executor

    test_omni_executor.Untouched.shut_down.clear()
    with pytest.raises(StageError, match="on fire") as caught:
        executor(dataclasses.replace(config, stages=stages))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert sorted(test_omni_executor.Untouched.shut_down) == ["encode", "guide", "picture"]


class PickyEngine(TextEngine):
    """Raises an error of ours while it loads."""

    def __init__(self, stage: StageConfig, context: EngineContext) -> None:
        raise CheckpointError("no weights here")


def test_our_own_errors_at_load_come_through_as_they_are() -> None:
    registry.register("stage kind", "picky", "test_omni_executor:PickyEngine")
    with pytest.raises(CheckpointError, match="no weights here"):
        executor(toy_config(stages={"text": toy_stage("text", "picky")}, outputs=("text",)))


def test_status_and_metrics_count_what_happened() -> None:
    loop = executor()
    answer(loop, request("a"))
    answer(loop, request("b", params=PictureParams(do="fail")))
    answer(loop, request("c", params=PictureParams(do="reject")))
    loop.add_request(request("d"))
    loop.abort("d")
    metrics = loop.get_metrics()
    ends = {key: metrics[key] for key in ("admitted", "finished", "failed", "aborted", "rejected")}
    assert ends == {"admitted": 3, "finished": 1, "failed": 1, "aborted": 1, "rejected": 1}
    assert metrics["stages"]["picture"]["steps"] == 3
    assert metrics["memory"]["planned_bytes"]["encode"] == 1000
    assert loop.get_status()["processed_requests"] == 3


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
    assert all(engine(loop, stage).work == {} for stage in ("encode", "guide", "picture"))
    assert loop.scheduler.in_flight() == set()
