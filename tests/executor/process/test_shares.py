"""What processes share, and what not: cores are shared out, weights are not, and the plan says so."""

from __future__ import annotations

import pytest
import torch

from vllm_omni.config.loader import load_config
from vllm_omni.entrypoints.cli.graph_report import as_json, describe
from vllm_omni.errors import ConfigError
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.memory import plan_memory
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.stage_builder import StageBuilder
from vllm_omni.worker.background import Background


def pipeline(*overrides: str) -> Pipeline:
    return Pipeline(load_config("tiny_scene", overrides))


def test_weights_that_two_stages_share_count_again_in_another_process() -> None:
    together, apart = plan_memory(pipeline()), plan_memory(given := pipeline("negative.executor=process"))
    assert together["negative"].weights_bytes == 0
    assert apart["negative"].weights_bytes == apart["writer"].weights_bytes > 0
    report = describe(given, apart)
    assert "its weights are loaded once more, since neither processes nor ranks share any" in report
    assert "negative · ar · asset://tiny-image/text_encoder · executor process" in report
    assert as_json(given, apart)["stages"]["negative"]["executor"] == "process"


def test_stages_in_one_process_still_share_when_another_has_its_own() -> None:
    plans = plan_memory(pipeline("writer.executor=process", "negative.executor=inline"))
    assert plans["negative"].weights_bytes > 0, "the writer's copy is elsewhere"


def test_the_executor_of_the_document_is_that_of_stages_that_say_none() -> None:
    found = load_config("tiny_scene", ["executor=process", "image.executor=thread"]).stages
    assert {name: stage.executor for name, stage in found.items()} == {
        "writer": "process",
        "negative": "process",
        "image": "thread",
    }
    with pytest.raises(ConfigError, match=r"executor: got 'procces', expected one of .*process"):
        load_config("tiny_scene", ["executor=procces"])


def test_processes_share_the_cores_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(*overrides: str) -> list[int | None]:
        given = pipeline(*overrides, "device=cpu")
        builder = StageBuilder(given, Background(), Commons())
        return [builder.blueprint(name).threads for name in given.specs]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert threads("executor=process") == [2, 2, 2]
    assert threads("executor=process", "negative.executor=inline", "writer.executor=inline") == [4, 4, 4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads("executor=process") == [1, 1, 1]


def test_a_blueprint_makes_the_spec_as_the_pipeline_made_it() -> None:
    given = pipeline("executor=process")
    plans = plan_memory(given)
    builder = StageBuilder(given, Background(), Commons())
    for name, spec in given.specs.items():
        again = builder.blueprint(name).describe()
        assert again.signature == spec.signature and again.precision == spec.precision
        assert again.plan_memory() == spec.plan_memory() and again.defaults == spec.defaults
    assert plans["writer"].kv_pool_bytes > 0
