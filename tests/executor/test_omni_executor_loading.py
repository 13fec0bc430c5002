from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.loop import answer, engine, executor, request
from support.toy_engine import PictureParams, TextSpecimen, toy_config, toy_stage

from vllm_omni import registry
from vllm_omni.engine.base import EngineContext, MemoryPlan, StageEngine
from vllm_omni.errors import (
    CheckpointError,
    ResourceError,
    StageError,
)
from vllm_omni.executor.inline import InlineExecutor
from vllm_omni.executor.memory import plan_memory, reserve_memory
from vllm_omni.executor.pipeline import Pipeline

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


def test_stages_that_no_output_calls_for_are_neither_planned_nor_loaded() -> None:
    config = toy_config()
    broken = toy_stage("picture", "toy_picture", {"states": "encode.states"}, fails_to_load=True, weights_bytes=2**60)
    stages = {"encode": config.stages["encode"], "picture": broken}
    loop = executor(dataclasses.replace(config, stages=stages, outputs=("encode",)))
    assert list(loop.get_metrics()["stages"]) == ["encode"] and "picture" not in loop.get_metrics()["memory"]
    assert engine(loop, "encode").wanted == {"text"}
    output = answer(loop, request("r", "ab"))
    assert output.text == "abab" and list(output.metrics) == ["encode"]
    refused = answer(loop, request("s", params={"picture": PictureParams(seed=1)}))
    assert "'picture'" in str(refused.error) and "not loaded" in str(refused.error)


def test_stages_of_one_kind_and_folder_count_their_weights_once(tmp_path: Any) -> None:
    shared = {"model": str(tmp_path), "weights_bytes": 1000}
    stages = {
        "a": toy_stage("a", "toy_text", **shared),
        "b": toy_stage("b", "toy_text", **shared),
        "c": dataclasses.replace(toy_stage("c", "toy_text", **shared), dtype="bfloat16"),
    }
    config = toy_config(stages=stages, outputs=("a", "b", "c"))
    plans = plan_memory(Pipeline(config))
    assert [plans[name].weights_bytes for name in "abc"] == [1000, 0, 1000]
    assert reserve_memory(config, plans).used_bytes == 2000 + 64 * 2**20


def test_an_accelerators_share_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.executor.memory.total_memory_bytes", lambda device: 3000)
    config = toy_config(max_gpu_utilization=0.5)
    with pytest.raises(ResourceError, match="max_gpu_utilization"):
        reserve_memory(config, {name: MemoryPlan(weights_bytes=1000) for name in config.stages})


class RecordingExecutor(InlineExecutor):
    """Notes who was shut down."""

    shut_down: list[str] = []  # noqa: RUF012

    def shutdown(self, *, wait: bool = True) -> None:
        if self._spec.stage.name not in self.shut_down:
            self.shut_down.append(self._spec.stage.name)
        super().shutdown(wait=wait)


def test_a_stage_that_cannot_load_takes_the_loaded_ones_down() -> None:
    registry.register("executor", "recording", f"{__name__}:RecordingExecutor")
    config = toy_config()
    stages = {name: dataclasses.replace(stage, executor="recording") for name, stage in config.stages.items()}
    options = dataclasses.replace(stages["picture"].options, fails_to_load=True)
    stages["picture"] = dataclasses.replace(stages["picture"], options=options)
    RecordingExecutor.shut_down.clear()
    with pytest.raises(StageError, match="on fire") as caught:
        executor(dataclasses.replace(config, stages=stages))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert sorted(RecordingExecutor.shut_down) == ["encode", "guide", "picture"]


class PickySpec(TextSpecimen):
    """Raises an error of ours while it loads."""

    def load(self, context: EngineContext) -> StageEngine:
        raise CheckpointError("no weights here")


def test_our_own_errors_at_load_come_through_as_they_are() -> None:
    registry.register("stage kind", "picky", f"{__name__}:PickySpec")
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
