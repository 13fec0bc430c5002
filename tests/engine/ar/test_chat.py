"""What a request may say of its chat, and that a template renders it as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.support.ar import (
    CHAT_TEMPLATE,
    GREEDY,
    KNOWN,
    check,
    done,
    make_encoder,
    make_engine,
    make_model_folder,
    make_task,
    make_tokenizer,
    run,
    states_of,
    tokens_of,
)
from vllm_omni import Omni
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import CheckpointError, InvalidRequestError, OmniError
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.chat import Chat

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}
USER = {"role": "user", "content": "  add one "}
CALLS = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "2"}]
# as published templates are built: macros, namespaces, loop controls, tool calls, reasoning, the tag for training
TEMPLATE = """{%- macro show(call) -%}<call>{{ call.function | tojson(indent=2) }}</call>{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}<tools>{{ tools | tojson }}</tools>{%- endif -%}
{%- for m in messages -%}
    {%- if m.role == 'skip' -%}{%- continue -%}{%- endif -%}
    {{- '<|im_start|>' ~ m['role'] ~ '\n' -}}
    {%- if m.reasoning_content and loop.index0 > ns.last -%}<think>{{ m.reasoning_content | trim }}</think>{%- endif -%}
    {%- generation -%}{%- set inner = m.content -%}{{- inner | trim if inner is string -}}{%- endgeneration -%}
    {%- for call in m.tool_calls or [] -%}{{ show(call) }}{%- endfor -%}
    {{- eos_token + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}<think></think>{%- endif -%}
{%- endif -%}
{{- dict(a=style).a if style is defined -}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("chat") / "model", template=TEMPLATE)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Any:
    return make_engine(folder, chat_template=True)


def words(engine: Any, prompt: Any) -> str:
    """The prompt that a model would read."""
    token_ids = check(engine, OmniRequest.from_prompt(prompt), GREEDY).token_ids
    return str(make_tokenizer().decode(token_ids, skip_special_tokens=False))


CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([{"role": "system", "content": "be kind"}, USER], {}),
    "thinking off": ([USER], {"chat_template_kwargs": {"enable_thinking": False}}),
    "tools": ([USER], {"tools": TOOLS}),
    "tool calls without content": (CALLS, {"tools": TOOLS}),
    "content that is null": ([USER, {**CALLS[1], "content": None}, CALLS[2]], {}),
    "reasoning": ([USER, {"role": "assistant", "content": "2", "reasoning": " hm "}], {}),
    "a null among the keys": ([{**USER, "name": None}], {"chat_template_kwargs": {"style": None}}),
    "continued": ([USER, {"role": "assistant", "content": "It is "}], {"continue_final_message": True}),
    "a skipped role": ([USER, {"role": "skip", "content": "x"}], {"chat_template_kwargs": {"style": "s"}}),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_template_renders_what_transformers_renders(folder: Path, engine: Any, name: str) -> None:
    messages, keys = CHATS[name]
    continues = keys.get("continue_final_message", False)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages,
        tools=keys.get("tools"),
        tokenize=True,
        return_dict=False,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        **keys.get("chat_template_kwargs", {}),
    )
    prepared = check(engine, OmniRequest.from_prompt({"messages": messages, **keys}), GREEDY)
    assert prepared.token_ids == expected


def test_a_string_is_a_chat_where_a_template_applies(engine: Any) -> None:
    keys = {"chat_template_kwargs": {"enable_thinking": False}, "tools": TOOLS}
    as_text, as_chat = (
        words(engine, {**prompt, **keys})
        for prompt in ({"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]})
    )
    assert as_text == as_chat and as_text.endswith("<think></think>") and '"name": "add"' in as_text


def test_a_continued_message_is_written_on_and_not_begun_anew(folder: Path) -> None:
    messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "the red"}]
    with Omni(_config(folder), progress=False) as omni:
        (output,) = omni.generate({"messages": messages, "continue_final_message": True}, GREEDY)
        ids = make_tokenizer()("<|im_start|>user\nsay it<|im_end|>\n<|im_start|>assistant\nthe red")["input_ids"]
        (expected,) = omni.generate({"prompt_token_ids": ids}, GREEDY)
    assert output.error is None and output.token_ids == expected.token_ids
    assert output.metrics["text"]["prompt_tokens"] == len(ids)


def _config(folder: Path, **keys: Any) -> dict[str, Any]:
    stage = {"kind": "ar", "model": str(folder), "max_model_len": 200, "block_size": 4, "num_blocks": 100, **keys}
    return {"stages": {"text": stage}, "outputs": ["text"], "device": "cpu", "dtype": "float32"}


LAST = {"role": "assistant", "content": "a"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kwargs that are a list": ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs: got .*expected a mapping"),
    "a key that is none": ({"chat_template_kwargs": {1: 2}}, "chat_template_kwargs: got the key 1"),
    "an object": ({"chat_template_kwargs": {"style": object()}}, "chat_template_kwargs.style: got a value of type"),
    "bytes": ({"chat_template_kwargs": {"style": b"x"}}, "chat_template_kwargs.style: got b'x'"),
    "a number that is none": ({"chat_template_kwargs": {"style": float("nan")}}, "style: got nan"),
    "more levels than anyone needs": ({"chat_template_kwargs": {"style": json.loads("[" * 90 + "]" * 90)}}, "levels"),
    "more values than anyone needs": ({"chat_template_kwargs": {"style": [[0] * 1000] * 200}}, "at most"),
    "what the stage sets": ({"chat_template_kwargs": {"add_generation_prompt": False}}, "set by the stage itself"),
    "what has its own key": ({"chat_template_kwargs": {"tools": []}}, "give tools as a key of the prompt"),
    "another template": ({"chat_template_kwargs": {"chat_template": "x"}}, "leave it out"),
    "what the template never reads": (
        {"chat_template_kwargs": {"enable_thinkin": True}},
        "enable_thinkin: not read by this model's chat template.*did you mean 'enable_thinking'",
    ),
    "tools that are a mapping": ({"tools": TOOLS[0]}, "tools: got .*expected a non-empty list"),
    "no tools": ({"tools": []}, "tools: got .*expected a non-empty list"),
    "a tool that is a name": ({"tools": ["add"]}, "tools: got .*expected a non-empty list of mappings"),
    "a function": ({"tools": [print]}, r"tools\[0\]: got a value of type"),
    "more text than a prompt may have": ({"tools": [{"description": "x" * 200_000}]}, "max_prompt_chars"),
    "a continuation that is no truth": ({"continue_final_message": 1}, "continue_final_message: got 1"),
    "a user to continue": ({"continue_final_message": True}, "role 'user', expected 'assistant'"),
    "a call to continue": (
        {"messages": [USER, CALLS[1]], "continue_final_message": True},
        "without content, expected some to continue",
    ),
    "a side that is none": ({"truncate_prompt": "up"}, "truncate_prompt: got 'up', expected one of left, right"),
    "a side that is a list": ({"truncate_prompt": ["left"]}, "truncate_prompt: got"),
    "an assistant that says and calls nothing": ({"messages": [USER, {"role": "assistant"}]}, "'role' and 'content'"),
    "an empty list of calls": ({"messages": [{"role": "assistant", "tool_calls": []}]}, "'role' and 'content'"),
    "a user without content": ({"messages": [{"role": "user", "content": None}]}, "'role' and 'content'"),
    "a user that calls tools": ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, "'role' and 'content'"),
    "content that is a number": ({"messages": [{"role": "user", "content": 5}]}, "string or a list of parts"),
    "an argument that is an object": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": object()}]}]},
        r"prompt\[1\].tool_calls\[0\].function: got a value of type",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_chat_cannot_be_is_refused_by_its_key(engine: Any, name: str) -> None:
    keys, words = WRONG[name]
    with pytest.raises(InvalidRequestError, match=words):
        check(engine, OmniRequest.from_prompt({"messages": [USER], **keys}), GREEDY)


@pytest.mark.parametrize("key", ["chat_template_kwargs", "tools", "continue_final_message"])
@pytest.mark.parametrize("prompt", [{"prompt_token_ids": [5, 6]}, {"prompt": "no template here"}])
def test_a_prompt_that_is_no_chat_has_no_chat_keys(folder: Path, key: str, prompt: dict[str, Any]) -> None:
    engine = make_engine(folder, chat_template=False)
    value = {"chat_template_kwargs": {"style": "s"}, "tools": TOOLS, "continue_final_message": True}[key]
    with pytest.raises(InvalidRequestError, match=f"{key}: got it with a prompt that is no chat"):
        check(engine, OmniRequest.from_prompt({**prompt, key: value}), GREEDY)


def test_tools_that_a_template_never_shows_are_refused(tmp_path: Path) -> None:
    engine = make_engine(make_model_folder(tmp_path / "model"), chat_template=True)
    with pytest.raises(InvalidRequestError, match="tools: not read by this model's chat template"):
        check(engine, OmniRequest.from_prompt({"prompt": "hi", "tools": TOOLS}), GREEDY)


def test_where_no_stage_reads_the_prompt_of_the_request_its_keys_are_refused() -> None:
    """The language models of this one are given what another stage has made of the prompt."""
    with Omni("tiny_audio", progress=False) as omni:
        (output,) = omni.generate({"prompt": "C4", "tools": TOOLS})
    assert output.status.value == "rejected" and "prompt['tools']: unknown key" in str(output.error)


def test_numbers_and_lists_of_other_libraries_are_taken(engine: Any) -> None:
    keys = {"chat_template_kwargs": {"enable_thinking": np.bool_(False), "style": np.float32(0.5)}}
    assert words(engine, {"messages": [USER], **keys}).endswith("<think></think>0.5")
    keys = {"chat_template_kwargs": {"style": np.arange(2)}}
    assert words(engine, {"messages": (USER,), **keys}).endswith("[0, 1]")


def test_the_cache_of_an_encoder_knows_what_the_request_says_of_its_chat(folder: Path) -> None:
    """Otherwise the hidden states of one chat would answer for another."""
    engine = make_encoder(folder, chat_template=True)
    prompts = [{"prompt": "hi"}, {"prompt": "hi", "chat_template_kwargs": {"enable_thinking": False}}]
    plain, quiet = (
        states_of(run(engine, make_task_of(prompt, f"r{number}"))[f"r{number}"])
        for number, prompt in enumerate(prompts)
    )
    assert plain.shape != quiet.shape
    spec = KNOWN[engine][0]
    keys = {spec.cache_key(make_task_of(prompt, "r")) for prompt in prompts}
    assert len(keys) == 2


def make_task_of(prompt: dict[str, Any], request_id: str) -> Any:
    task = make_task("", request_id=request_id)
    request = OmniRequest.from_prompt({**prompt, "request_id": request_id})
    return type(task)(request, "text", task.params, {})


def test_a_template_in_a_file_of_its_own_stands_above_the_older_places(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", template="old {{ messages[0].content }}")
    (model / "chat_template.jinja").unlink()

    def rendered() -> str:
        processor = TextProcessor(model)
        return processor.decode(processor.encode([{"role": "user", "content": "x"}]), False)

    config = model / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "chat_template": "config {{ messages[0].content }}"}))
    assert rendered() == "config x"
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "legacy {{ messages[0].content }}"}))
    assert rendered() == "legacy x"
    (model / "chat_template.jinja").write_text("jinja {{ messages[0].content }}")
    assert rendered() == "jinja x"


def test_a_template_for_tools_is_taken_for_tools(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", template="plain")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ tools | length }}")
    processor = TextProcessor(model)
    for tools, text in ((None, "plain"), (TOOLS, "tools 1")):
        assert processor.decode(processor.encode(Chat([USER], tools=tools)), False) == text


@pytest.mark.parametrize("content", [{}, {"chat_template": 5}, {"chat_template": {"default": 1}}])
def test_a_file_that_holds_no_template_is_said(tmp_path: Path, content: dict[str, Any]) -> None:
    model = make_model_folder(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="chat_template"):
        TextProcessor(model)


def test_one_chat_that_a_template_refuses_fails_alone(tmp_path: Path) -> None:
    template = "{% if messages[0].content == 'no' %}{{ raise_exception('not ' ~ 'this') }}{% endif %}" + CHAT_TEMPLATE
    config = _config(make_model_folder(tmp_path / "model", template=template))
    with Omni(config, progress=False) as omni:
        good, bad = omni.generate(["yes", "no"], GREEDY)
    assert good.error is None and good.text and isinstance(bad.error, OmniError)
    assert "does not take these messages (not this)" in str(bad.error)


def test_a_prompt_from_an_edge_knows_nothing_of_the_keys_of_the_request(folder: Path) -> None:
    engine = make_engine(folder, chat_template=True, inputs={"prompt": "writer.text"})
    task = make_task("unread", GREEDY, inputs={"prompt": "hi"})
    fields = {"chat_template_kwargs": {"enable_thinking": False}}
    odd = type(task)(OmniRequest(prompt="unread", request_id="r", fields=fields), "text", GREEDY, task.inputs)
    assert tokens_of(run(engine, odd)["r"]) == tokens_of(run(engine, task)["r"])
    done(run(engine, task)["r"])
