"""What generation_config.json says of sampling: below the config's defaults, and these below the request's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.ar import make_model_folder, make_spec, make_stage

from vllm_omni import Omni, SamplingParams
from vllm_omni.config.schema import OmniConfig
from vllm_omni.errors import ConfigError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.planner import RequestPlanner
from vllm_omni.request import OmniRequest

PUBLISHED = {  # of Qwen/Qwen3-0.6B
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": [2, 1],
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_model_folder(tmp_path / "model")
    says(folder, **PUBLISHED)
    return folder


def says(folder: Path, **content: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))


def params_of(model: Path, request: SamplingParams | None = None, **stage: Any) -> SamplingParams:
    """As a request's task has them."""
    config = OmniConfig(stages={"text": make_stage(model, **stage)}, outputs=("text",))
    plan = RequestPlanner(Pipeline(config)).plan(OmniRequest(prompt=[5, 6], params=request))
    params = plan.stages["text"].params
    assert isinstance(params, SamplingParams)
    return params


def test_the_published_sampling_is_the_default(model: Path) -> None:
    params = params_of(model)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 20, 0.95, None)


def test_the_config_stands_above_the_checkpoint_and_the_request_above_both(model: Path) -> None:
    params = params_of(model, SamplingParams(top_k=3), defaults={"temperature": 0.2, "top_k": 7})
    assert (params.temperature, params.top_k, params.top_p) == (0.2, 3, 0.95)


def test_it_can_be_ignored(model: Path) -> None:
    assert params_of(model, generation_config="ignore") == SamplingParams()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        (
            {"max_new_tokens": 12, "min_p": 0.1, "repetition_penalty": 1.1},
            {"max_tokens": 12, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
        ({"temperature": None, "top_k": 0}, {"top_k": 0}),
        ({"eos_token_id": 2, "num_beams": 4}, {}),
    ],
)
def test_every_key_becomes_the_field_that_means_the_same(
    model: Path, content: dict[str, Any], expected: dict[str, Any]
) -> None:
    says(model, **content)
    assert params_of(model) == SamplingParams(**expected)


@pytest.mark.parametrize("content", [{"top_p": 3}, {"temperature": "hot"}, {"top_k": [1]}, {"max_new_tokens": -1}])
def test_what_no_sampling_could_use_is_named_with_file_and_fix(model: Path, content: dict[str, Any]) -> None:
    says(model, **content)
    with pytest.raises(ConfigError, match=r"generation_config\.json: .*expected.*generation_config to ignore"):
        params_of(model)
    assert params_of(model, generation_config="ignore") == SamplingParams()


def test_a_checkpoint_that_does_not_sample_writes_the_same_as_temperature_zero(model: Path) -> None:
    says(model, do_sample=False, max_new_tokens=6)
    with Omni({"stages": {"text": {"kind": "ar", "model": str(model)}}, "outputs": ["text"]}) as omni:
        (plain,) = omni.generate([[5, 6, 7]])
        (greedy,) = omni.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=6))
    assert plain.token_ids == greedy.token_ids and len(plain.token_ids or ()) <= 6


def test_check_says_where_each_default_comes_from(model: Path) -> None:
    note = make_spec(make_stage(model, defaults={"temperature": 0.2})).note()
    said = "temperature 0.2 (config), top_k 20 (generation_config.json), top_p 0.95 (generation_config.json)"
    assert note.endswith(f"; defaults: {said}")


def test_a_stage_that_writes_nothing_reads_no_sampling(model: Path) -> None:
    spec = make_spec(make_stage(model, task="encode", outputs={"h": {"layers": [-1]}}))
    assert spec.defaults == {} and "defaults" not in spec.note()


def test_the_key_is_refused_where_nothing_is_sampled(model: Path) -> None:
    with pytest.raises(ConfigError, match="generation_config: task encode samples nothing"):
        make_spec(make_stage(model, task="encode", outputs={"h": {"layers": [-1]}}, generation_config="ignore"))
