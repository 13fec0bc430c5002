"""Words in and words out of the AR stage: templates, edges, streams, stop strings, the tokenizer."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import (
    EOS,
    GREEDY,
    assert_clean,
    check,
    done,
    failed,
    make_encoder,
    make_engine,
    make_model_folder,
    make_spec,
    make_stage,
    make_task,
    make_tokenizer,
    run,
    states_of,
    submit,
    tokens_of,
)

from tests.support.steering import steer
from vllm_omni.engine.ar.text_job import TOLD_TOGETHER, read_sections
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import ConfigError, InvalidRequestError, StageError
from vllm_omni.messages import StageDone, StageProgress
from vllm_omni.params import DiffusionParams, SamplingParams
from vllm_omni.payload import StagePayload
from vllm_omni.request import OmniRequest

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


def test_streamed_text_adds_up_and_never_holds_half_a_character(folder: Path) -> None:
    words = "日本 é ☃ 你好 🙂"
    ids = make_tokenizer()(words)["input_ids"]
    assert len(ids) > len(words), "some characters must be spread over several tokens"
    engine = make_engine(folder)
    submit(engine, make_task("a", SamplingParams(temperature=0, max_tokens=len(ids), ignore_eos=True)))
    steered = steer(engine, ids)
    pieces = [event.text for event in steered if isinstance(event, StageProgress)]
    final = steered[-1]
    assert isinstance(final, StageDone)
    assert final.payload.meta["text"] == "".join(pieces) == words
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) == len(ids)


@pytest.mark.parametrize("stop", [None, ["zz"], ["好 2 "]])
@pytest.mark.parametrize("ends", [False, True])
def test_words_that_nobody_waits_for_are_told_together_and_are_the_same(
    folder: Path, stop: list[str] | None, ends: bool
) -> None:
    """Also those so far, at any time, half characters and an ending token among them."""
    ids = make_tokenizer()("".join(f"日本 é {number} 你好 {number} 🙂" for number in range(8)))["input_ids"]
    ids = [*ids[:-1], *([EOS] if ends else [])]
    params = SamplingParams(temperature=0, max_tokens=len(ids), ignore_eos=not ends, stop=stop, logprobs=1)
    told: dict[bool, list[StageProgress]] = {}
    payloads: dict[bool, Any] = {}
    so_far: dict[bool, list[StagePayload | None]] = {True: [], False: []}
    for is_watched, partials in so_far.items():
        engine = make_engine(folder)
        submit(engine, dataclasses.replace(make_task("a", params), is_watched=is_watched))
        *events, end = steer(engine, ids, lambda: partials.append(engine.partial_result("r")))  # noqa: B023
        payloads[is_watched] = end.payload.meta
        told[is_watched] = [event for event in events if isinstance(event, StageProgress)]
    assert so_far[True] == so_far[False] and so_far[True][5] is not None
    assert payloads[True] == payloads[False]
    assert payloads[True]["text"] == "".join(event.text for event in told[False])
    for name in ("token_ids", "logprobs"):
        apart, together = ([item for event in told[kind] for item in getattr(event, name)] for kind in (True, False))
        assert apart == together
    assert [event.finish_reason for event in told[False]][-1] == payloads[True]["finish_reason"]
    num_written = len(payloads[True]["token_ids"])
    assert len(told[True]) == num_written and len(told[False]) == -(-num_written // TOLD_TOGETHER)


@pytest.mark.parametrize(
    ("stop", "text", "extra"),
    [
        ("square", "a red circle left of a blue ", {}),
        (["nowhere", "cle l"], "a red cir", {}),
        ("of a blue squares", "a red circle left of a blue square", {}),
        ("a", "", {}),
        ("a", "a red circle left of ", {"min_tokens": 4}),
    ],
)
def test_a_stop_string_cuts_the_text_and_is_never_streamed(folder: Path, stop: Any, text: str, extra: Any) -> None:
    words = "a red circle left of a blue square"
    ids = make_tokenizer()(words)["input_ids"]
    assert len(ids) > 4
    engine = make_engine(folder)
    params = SamplingParams(temperature=0, max_tokens=len(ids), ignore_eos=True, stop=stop, **extra)
    submit(engine, make_task("a", params))
    events = steer(engine, ids)
    assert events[-1].payload.meta["text"] == text
    assert "".join(event.text for event in events[:-1]) == text
    assert events[-1].payload.meta["finish_reason"] == ("stop" if text != words else "length")
    assert_clean(engine)


def test_special_tokens_are_left_out_of_the_text_unless_asked_for(folder: Path) -> None:
    for skip, text in ((None, "aa"), (True, "aa"), (False, "a<|im_start|>a")):
        engine = make_engine(folder)
        token = make_tokenizer()("a")["input_ids"][0]
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, skip_special_tokens=skip)
        submit(engine, make_task("x", params))
        assert steer(engine, [token, 1, token])[-1].payload.meta["text"] == text


def test_min_tokens_puts_the_end_off(folder: Path) -> None:
    end = tokens_of(run(make_engine(folder), make_task(PROMPT, GREEDY))["r"])[2]
    lengths = []
    for minimum in (None, 7):
        params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[end], min_tokens=minimum, ignore_eos=True)
        written = tokens_of(run(make_engine(folder), make_task(PROMPT, params))["r"])
        assert end not in written[: minimum or 0]
        lengths.append(len(written))
    assert lengths[0] <= 3 and lengths[1] > 7


def test_the_chat_template_applies_to_strings_and_messages_alike(folder: Path) -> None:
    options = {"chat_template": True, "chat_template_kwargs": {"enable_thinking": True}}
    string, messages = (
        run(make_encoder(folder, **options), make_task(prompt))["r"]
        for prompt in ("hello", [{"role": "user", "content": "hello"}])
    )
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>"
    plain = run(make_encoder(folder), make_task(make_tokenizer()(rendered)["input_ids"]))["r"]
    assert torch.equal(states_of(string), states_of(messages))
    assert torch.equal(states_of(string), states_of(plain))
    as_it_is = run(make_encoder(folder, chat_template=False), make_task("hello"))["r"]
    assert len(states_of(as_it_is)) == len(make_tokenizer()("hello")["input_ids"])


def test_the_system_prompt_comes_first_where_a_chat_has_none_of_its_own(folder: Path) -> None:
    options = {"chat_template": True, "system_prompt": "be kind"}
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}
    expected = states_of(run(make_encoder(folder, chat_template=True), make_task([system, user]))["r"])
    for prompt in ("hello", [user], [system, user]):
        assert torch.equal(states_of(run(make_encoder(folder, **options), make_task(prompt))["r"]), expected)
    own = states_of(run(make_encoder(folder, **options), make_task([{**system, "content": "be brief"}, user]))["r"])
    assert own.shape != expected.shape or not torch.equal(own, expected)


def test_without_a_template_strings_pass_and_messages_do_not(tmp_path: Path) -> None:
    engine = make_encoder(make_model_folder(tmp_path / "model", template=None), chat_template=True)
    done(run(engine, make_task("hello"))["r"])
    with pytest.raises(ConfigError, match="no chat template"):
        run(engine, make_task([{"role": "user", "content": "hello"}]))


def test_the_tokenizer_is_found_beside_the_model_and_its_absence_is_said(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "text_encoder")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (model / file).rename(tmp_path / "tokenizer" / file)
    done(run(make_encoder(model, chat_template=True), make_task("hello"))["r"])
    (tmp_path / "tokenizer").rename(tmp_path / "words")
    done(run(make_encoder(model, tokenizer=str(tmp_path / "words")), make_task("hello"))["r"])
    without = make_encoder(model)
    done(run(without, make_task([1, 2, 3]))["r"])
    with pytest.raises(InvalidRequestError, match=r"got words, expected token ids, since .*text_encoder has no"):
        run(without, make_task("hello"))


def test_a_prompt_longer_than_the_tokenizer_expects_draws_no_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stage has its own limit, and says so in its own words."""
    shutil.copytree(folder, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    content = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps({**content, "model_max_length": 4}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    processor = TextProcessor(tmp_path / "model")
    assert processor.tokenizer.model_max_length == 4 and len(processor.encode("one two three four five six")) > 4
    assert not caplog.records


def test_an_edge_brings_the_prompt(folder: Path) -> None:
    direct = run(make_encoder(folder), make_task("from the edge"))["r"]
    engine = make_encoder(folder, inputs={"prompt": "writer.text"})
    task = make_task("ignored", inputs={"prompt": "from the edge"})
    assert check(engine, task.request, task.params) is None
    assert torch.equal(states_of(run(engine, task)["r"]), states_of(direct))


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("scene: a red circle\nsound: C4", {"scene": "a red circle", "sound": "C4"}),
        ("sound:C4 \r\nwords", {"sound": "C4"}),
        ("hello\nscene:  one: two \nscene: three", {"scene": "one: two"}),
        ("scene:", {"scene": ""}),
        ("hello", {}),
        (" scene: a\nScene: b\nscene : c\nmy scene: d\nscene", {}),
        ("scene: a\u2028sound: b", {"scene": "a\u2028sound: b"}),
    ],
)
def test_the_first_line_that_begins_with_a_label_is_its_section(text: str, sections: dict[str, str]) -> None:
    assert read_sections(text, ("scene", "sound")) == sections


def test_sections_stand_in_the_meta_and_leave_the_text_as_it_is(folder: Path) -> None:
    engine = make_engine(folder, sections=["scene", "sound"])
    signature = make_spec(make_stage(folder, sections=["scene", "sound"])).signature
    assert set(signature.outputs) == {"text", "scene", "sound"} and signature.results == {"text"}
    words = "sound: the end\nmore"
    ids = make_tokenizer()(words)["input_ids"]
    submit(engine, make_task("a", SamplingParams(temperature=0, max_tokens=len(ids), ignore_eos=True)))
    meta = done(steer(engine, ids)[-1]).payload.meta
    assert meta["text"] == words and meta["sound"] == "the end" and "scene" not in meta
    assert set(meta) <= signature.meta


def test_what_an_edge_brings_is_checked_too_and_fails_alone(folder: Path) -> None:
    engine = make_encoder(folder, inputs={"prompt": "writer.text"}, max_prompt_tokens=8)
    brought = {"good": "short", "long": "long " * 50, "empty": ""}
    ended = run(engine, *(make_task("x", None, name, {"prompt": text}) for name, text in brought.items()))
    assert "expected at most 8 (max_prompt_tokens)" in failed(ended["long"], StageError)
    assert "what writer.text gave: prompt: got no tokens" in failed(ended["empty"], StageError)
    done(ended["good"])


@pytest.mark.parametrize(
    ("request_keys", "expected"),
    [
        ({}, ""),
        ({"negative_prompt": "ugly"}, "ugly"),
        ({"negative_prompt": "ugly", "params": DiffusionParams(negative_prompt="worse")}, "worse"),
        ({"negative_prompt": "ugly", "params": {"image": DiffusionParams(negative_prompt="")}}, ""),
        ({"negative_prompt": "ugly", "params": {"image": DiffusionParams(), "text": SamplingParams()}}, "ugly"),
    ],
)
def test_the_negative_prompt_is_read_from_params_then_request(folder: Path, request_keys: Any, expected: str) -> None:
    engine = make_encoder(folder, prompt="negative_prompt", chat_template=True)
    task = make_task("positive")
    task = type(task)(OmniRequest(prompt="positive", request_id="r", **request_keys), "text", SamplingParams())
    reference = run(make_encoder(folder, chat_template=True), make_task(expected))["r"]
    assert torch.equal(states_of(run(engine, task)["r"]), states_of(reference))


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decoding_gives_what_the_tokenizer_gives(folder: Path, skip_special_tokens: bool) -> None:
    processor = TextProcessor(folder)
    for token_ids in torch.randint(0, len(processor.tokenizer), (50, 12)).tolist():
        expected = processor.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert processor.decode(token_ids, skip_special_tokens) == expected
