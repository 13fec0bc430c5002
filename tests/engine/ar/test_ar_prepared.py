"""What the spec of an AR stage prepares is used: nothing is tokenised twice. What leaves the stage is plain JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.ar import (
    GREEDY,
    done,
    load,
    make_engine,
    make_model_folder,
    make_spec,
    make_stage,
    make_task,
    run,
    tokens_of,
)

from vllm_omni import registry
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.engine.base import ReadPorts
from vllm_omni.engine.output import make_result
from vllm_omni.layers.attention.native import NativeAttention
from vllm_omni.layers.attention.reference import ReferenceAttention
from vllm_omni.layers.attention.sdpa import SDPAAttention
from vllm_omni.layers.native.library import built_variants
from vllm_omni.params import SamplingParams
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.chat import Chat

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every prompt that is tokenised."""
    found: list[Any] = []
    plain = TextProcessor.encode

    def counting(self: TextProcessor, prompt: Any) -> list[int]:
        found.append(prompt)
        return plain(self, prompt)

    monkeypatch.setattr(TextProcessor, "encode", counting)
    return found


@pytest.mark.parametrize("prompt", [PROMPT, [{"role": "user", "content": PROMPT}]])
def test_a_prompt_is_tokenised_once(folder: Path, encoded: list[Any], prompt: Any) -> None:
    done(run(make_engine(folder), make_task(prompt, GREEDY))["r"])
    assert encoded == [prompt if isinstance(prompt, str) else Chat(prompt)]


def test_what_an_edge_brings_is_tokenised_when_its_task_starts_and_the_request_not_at_all(
    folder: Path, encoded: list[Any]
) -> None:
    engine = make_engine(folder, inputs={"prompt": "writer.text"})
    done(run(engine, make_task("unread", GREEDY, inputs={"prompt": PROMPT}))["r"])
    assert encoded == [PROMPT]


def test_the_size_of_a_job_counts_the_tokens_that_were_prepared(folder: Path) -> None:
    spec = make_spec(make_stage(folder))
    request, params = OmniRequest(prompt="a" * 40), SamplingParams(max_tokens=7, n=2)
    prepared = spec.check(request, params, ReadPorts())
    assert spec.job_size(request, params, prepared) == prepared.num_tokens / 10 + 14
    assert spec.job_size(request, params, None) == 1 + 14, "an edge's words are unknown; the request's stand in"


def test_the_meta_of_a_payload_is_plain_json_and_makes_the_same_completions(folder: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=1, n=2, max_tokens=4, ignore_eos=True, logprobs=2)
    payload = done(run(make_engine(folder), make_task(PROMPT, params))["r"]).payload
    assert json.loads(json.dumps(payload.meta)) == payload.meta
    first, second = make_result(payload).completions
    assert first.token_ids == tuple(payload.meta["token_ids"]) and first.text == payload.meta["text"]
    assert first.token_ids != second.token_ids and first.finish_reason == "length"
    assert first.logprobs is not None and len(first.logprobs) == 4
    for token, logprobs in zip(first.token_ids, first.logprobs, strict=True):
        assert next(iter(logprobs)) == token and all(isinstance(key, int) for key in logprobs)
    bare = done(run(make_engine(folder), make_task(PROMPT, GREEDY))["r"]).payload
    assert make_result(bare).completions[0].logprobs is None


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("auto", NativeAttention, marks=pytest.mark.skipif(not built_variants(), reason="no kernels")),
        ("sdpa", SDPAAttention),
        ("reference", ReferenceAttention),
    ],
)
def test_the_attention_of_the_config_runs(
    folder: Path, name: str, backend: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(run(make_engine(folder), make_task(PROMPT, GREEDY))["r"])
    used: list[type] = []

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        used.append(type(self))
        plain(self, *args, **kwargs)

    plain = backend.__init__
    monkeypatch.setattr(backend, "__init__", noting)
    assert tokens_of(run(make_engine(folder, attention=name), make_task(PROMPT, GREEDY))["r"]) == expected
    assert set(used) == {backend}


def test_a_spec_is_chosen_by_the_registry_and_reads_no_file_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(make_stage(folder, outputs={"h": {"layers": [1]}}))
    assert type(spec).__name__ == "TextSpec"
    load(spec)
    spec.check(OmniRequest(prompt=PROMPT), GREEDY, ReadPorts())

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a file is read again")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    prepared = spec.check(OmniRequest(prompt=PROMPT), GREEDY, ReadPorts())
    spec.job_size(OmniRequest(prompt=PROMPT), GREEDY, prepared)
    monkeypatch.undo()
    monkeypatch.setitem(registry.TABLES["ar stage"], "Qwen3ForCausalLM", f"{__name__}:OtherSpec")
    with pytest.raises(Chosen):
        make_spec(make_stage(folder))


class Chosen(Exception):
    """The registry's class was made."""


class OtherSpec:
    def __init__(self, *_: Any) -> None:
        raise Chosen
