"""Inputs of a request besides its words: each is read by a stage that says so; a key that nobody reads is an error."""

from __future__ import annotations

from typing import Any

import pytest
from support.toy_engine import PictureParams, TextEngine, TextParams, TextSpecimen, register_toys, toy_stage

from vllm_omni import Omni, OmniRequest, registry
from vllm_omni.config.schema import OmniConfig
from vllm_omni.entrypoints.prompts import make_request
from vllm_omni.errors import InvalidRequestError
from vllm_omni.messages import StageTask
from vllm_omni.payload import StagePayload


class SingerEngine(TextEngine):
    """Says what it was given to sing."""

    def make(self, task: Any) -> StagePayload:
        payload = super().make(task)
        sung = str(task.request.fields.get("lyrics"))
        return StagePayload(payload.request_id, payload.source, payload.tensors, {"text": sung})


class SingerSpec(TextSpecimen):
    """The stage's name says which key it reads."""

    engine_type = SingerEngine

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.request_keys = frozenset({"lyrics"} if self.stage.name == "encode" else {"echo"})

    def cache_key(self, task: StageTask) -> str | None:
        return None  # what is sung is no matter of the prompt alone


@pytest.fixture
def omni(monkeypatch: pytest.MonkeyPatch) -> Omni:
    """encode (reads lyrics) -> picture, and `guide` (reads echo), which only guided requests need."""
    monkeypatch.setitem(registry.TABLES, "stage kind", dict(registry.TABLES["stage kind"]))
    register_toys()
    registry.register("stage kind", "toy_singer", f"{__name__}:SingerSpec")
    stages = [
        toy_stage("encode", "toy_singer"),
        toy_stage("guide", "toy_singer"),
        toy_stage("picture", "toy_picture", {"states": "encode.states", "guide": "guide.states"}),
    ]
    return Omni(OmniConfig(stages={stage.name: stage for stage in stages}, outputs=("encode", "picture")))


def refusal(omni: Omni, params: Any = None, **fields: Any) -> str:
    (output,) = omni.generate({"prompt": "a", **fields}, params)
    assert isinstance(output.error, InvalidRequestError) and not output.results
    return str(output.error)


def test_a_stage_reads_what_the_prompt_brings(omni: Omni) -> None:
    with omni:
        (output,) = omni.generate({"prompt": "a", "lyrics": "la la"})
        (other,) = omni.generate(OmniRequest(prompt="a", fields={"lyrics": "do re"}))
        (unset,) = omni.generate({"prompt": "a", "lyrics": None})
    assert (output.text, other.text, unset.text) == ("la la", "do re", "None")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lirycs", "prompt['lirycs']: unknown key (did you mean 'lyrics'?)"),
        ("ecko", "unknown key (did you mean 'echo'?)"),
        ("priorty", "unknown key (did you mean 'priority'?)"),
        ("xyz", "unknown key (known: echo, lyrics, messages, negative_prompt, outputs, priority, prompt,"),
        ("k" * 10_000, "unknown key (known: "),
    ],
)
def test_a_key_that_no_stage_reads_is_an_error(omni: Omni, key: str, words: str) -> None:
    with omni:
        message = refusal(omni, **{key: "x"})
        assert words in message and len(message) < 300
        assert words in refusal(omni, **{key: None})


def test_a_key_of_a_stage_that_rests_is_an_error_and_is_read_when_it_runs(omni: Omni) -> None:
    with omni:
        assert "prompt['echo']: stage 'guide' reads it, which does not run for this request" in refusal(omni, echo="x")
        (output,) = omni.generate({"prompt": "a", "echo": "x"}, PictureParams(guided=True))
        (unset,) = omni.generate({"prompt": "a", "echo": None})
    assert output.error is None and unset.error is None


def test_parameters_of_a_stage_that_rests_are_an_error_and_are_read_when_it_runs(omni: Omni) -> None:
    by_stage = {"guide": TextParams(steps=3), "picture": PictureParams(guided=False)}
    with omni:
        words = "params['guide']: got TextParams with steps, but the stage does not run for this request"
        assert words in refusal(omni, by_stage)
        assert omni.generate("a", {**by_stage, "guide": TextParams()})[0].error is None
        (output,) = omni.generate("a", {**by_stage, "picture": PictureParams(guided=True)})
    assert output.error is None and output.metrics["guide"]["steps"] == 3


def test_a_typo_in_the_key_of_the_words_is_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"got none of .*; got 'promt' \(did you mean 'prompt'\?\)"):
        OmniRequest.from_prompt({"promt": "a"})


@pytest.mark.parametrize("fields", [{"prompt": "x"}, {3: "x"}, ["lyrics"], None])
def test_fields_are_named_unlike_the_requests_own(fields: Any) -> None:
    with pytest.raises(InvalidRequestError, match="fields: got"):
        OmniRequest(prompt="a", fields=fields)


def test_a_request_keeps_its_fields_when_params_are_added_and_none_that_change_later() -> None:
    fields = {"lyrics": "la"}
    request = make_request(OmniRequest(prompt="a", priority="high", fields=fields), PictureParams(seed=1))
    fields["lyrics"] = "changed"
    assert isinstance(request, OmniRequest)
    assert (request.fields, request.priority, request.params) == ({"lyrics": "la"}, "high", PictureParams(seed=1))
