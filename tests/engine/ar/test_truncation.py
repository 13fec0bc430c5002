"""Prompts that are too long and may be cut: what stays, what goes, and that the chat template's own marks stay."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from tests.support.ar import GREEDY, check, make_encoder, make_engine, make_model_folder, make_tokenizer
from vllm_omni import Omni
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.request import OmniRequest

SYSTEM = {"role": "system", "content": "be kind"}
BEGIN = "<|im_start|>assistant\n"
LIMIT = 90
SIDES = ["left", "right", "middle"]
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("cut") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Any:
    return make_engine(folder, chat_template=True, max_prompt_tokens=LIMIT)


def cut(engine: Any, prompt: Any, side: str | None) -> tuple[str, Any]:
    keys = {} if side is None else {"truncate_prompt": side}
    prepared = check(engine, OmniRequest.from_prompt({**prompt, **keys}), GREEDY)
    return str(TOKENIZER.decode(prepared.token_ids, skip_special_tokens=False)), prepared


def chat(*sizes: int) -> list[dict[str, str]]:
    """A system message, then user and assistant in turn, each text of so many words that say whose they are."""
    roles = ("user", "assistant")
    texts = [" ".join(f"{number}.{word}" for word in range(size)) for number, size in enumerate(sizes)]
    return [SYSTEM, *({"role": roles[n % 2], "content": text} for n, text in enumerate(texts))]


def turn(message: dict[str, str]) -> str:
    return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"


def test_left_drops_the_oldest_turns_whole(engine: Any) -> None:
    messages = chat(6, 6, 6, 6, 6)
    text, prepared = cut(engine, {"messages": messages}, "left")
    assert text in [turn(SYSTEM) + "".join(map(turn, messages[n:])) + BEGIN for n in (3, 5)]
    assert len(prepared.token_ids) <= LIMIT
    whole = make_tokenizer()("".join(map(turn, messages)) + BEGIN)["input_ids"]
    assert prepared.num_truncated == len(whole) - len(prepared.token_ids) > 0


def test_left_keeps_the_end_of_a_question_that_alone_is_too_long(engine: Any) -> None:
    messages = chat(3, 3, 80)
    text, _ = cut(engine, {"messages": messages}, "left")
    assert text.startswith(turn(SYSTEM) + "<|im_start|>user\n") and text.endswith("2.79<|im_end|>\n" + BEGIN)
    assert "0.0" not in text and "2.0 " not in text


def test_right_keeps_the_beginning(engine: Any) -> None:
    messages = chat(6, 6, 6, 6, 6)
    text, _ = cut(engine, {"messages": messages}, "right")
    assert text.startswith("".join(map(turn, messages[:2]))) and text.endswith("<|im_end|>\n" + BEGIN)
    assert "4.5" not in text
    text, _ = cut(engine, {"messages": chat(80)}, "right")
    assert text.startswith(turn(SYSTEM) + "<|im_start|>user\n0.0 0.1") and "0.79" not in text


def test_middle_keeps_both_ends(engine: Any) -> None:
    messages = chat(4, 4, 4, 4, 4, 4, 4)
    text, _ = cut(engine, {"messages": messages}, "middle")
    assert text.startswith("".join(map(turn, messages[:3]))) and text.endswith(turn(messages[-1]) + BEGIN)
    assert turn(messages[3]) not in text
    text, _ = cut(engine, {"messages": chat(80)}, "middle")
    assert "user\n0.0 0.1" in text and text.endswith("0.79<|im_end|>\n" + BEGIN) and "0.40" not in text


@pytest.mark.parametrize("side", SIDES)
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=7))
def test_a_cut_chat_fits_and_is_a_chat(folder: Path, side: str, sizes: list[int]) -> None:
    """Whole marks in their order, the system message first, the begun answer last, and every text a part of its own."""
    engine = _engine(folder)
    messages = chat(*sizes)
    text, prepared = cut(engine, {"messages": messages}, side)
    assert len(prepared.token_ids) <= LIMIT
    assert text.startswith(turn(SYSTEM)) and text.endswith(BEGIN)
    parts = [part.split("\n", 1) for part in text.removesuffix(BEGIN).split("<|im_start|>")[1:]]
    kept = [(role, content.removesuffix("<|im_end|>\n")) for role, content in parts]
    places = [_place(messages, role, content) for role, content in kept if content]
    assert all(before < after for before, after in pairwise(places))
    if prepared.num_truncated == 0:
        assert text == "".join(map(turn, messages)) + BEGIN


ENGINES: dict[Path, Any] = {}


def _engine(folder: Path) -> Any:
    return ENGINES.setdefault(folder, make_engine(folder, chat_template=True, max_prompt_tokens=LIMIT))


def _place(messages: list[dict[str, str]], role: str, content: str) -> int:
    half = (len(content) + 1) // 2
    places = [
        number
        for number, message in enumerate(messages)
        if message["role"] == role
        and message["content"].startswith(content[:half])
        and message["content"].endswith(content[half:])
    ]
    if places:
        return places[0]
    return next(n for n, message in enumerate(messages) if message["role"] == role and content in message["content"])


def test_a_turn_that_calls_tools_goes_whole(folder: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or m.tool_calls[0].name }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = folder.parent / "tools"
    engine = make_engine(make_model_folder(model, template=template), chat_template=True, max_prompt_tokens=70)
    calls = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    old = [{"role": "user", "content": "old"}, calls, {"role": "tool", "content": "found " * 20}]
    text, _ = cut(engine, {"messages": [*old, {"role": "user", "content": "new"}]}, "left")
    assert text == "<|im_start|>user\nnew<|im_end|>\n" + BEGIN
    text, _ = cut(engine, {"messages": [*old, {"role": "user", "content": "new"}]}, "right")
    assert text.startswith("<|im_start|>user\nold<|im_end|>\n<|im_start|>assistant\nlook<|im_end|>\n<|im_start|>tool")


def test_a_message_to_continue_stays_open(engine: Any) -> None:
    messages = [*chat(60), {"role": "assistant", "content": "It is"}]
    text, _ = cut(engine, {"messages": messages, "continue_final_message": True}, "left")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\nIt is")


@pytest.mark.parametrize(("side", "places"), [("left", [10, 20]), ("right", [0, 10]), ("middle", [0, 5, 15, 20])])
def test_token_ids_lose_the_side_that_is_said(folder: Path, side: str, places: list[int]) -> None:
    engine = make_engine(folder, max_prompt_tokens=10)
    ids = list(range(100, 120))
    _, prepared = cut(engine, {"prompt_token_ids": ids}, side)
    expected = [token for a, b in zip(places[::2], places[1::2], strict=True) for token in ids[a:b]]
    assert prepared.token_ids == expected and prepared.num_truncated == 10


@pytest.mark.parametrize("side", SIDES)
def test_a_text_keeps_the_special_tokens_around_it(tmp_path: Path, side: str) -> None:
    model = make_model_folder(tmp_path / "model", template=None)
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save_pretrained(model)
    text = " ".join(str(number) for number in range(40))
    _, prepared = cut(make_engine(model, max_prompt_tokens=12), {"prompt": text}, side)
    assert (prepared.token_ids[0], prepared.token_ids[-1], len(prepared.token_ids)) == (1, 2, 12)
    plain = make_tokenizer()(text)["input_ids"]
    expected = {"left": plain[-10:], "right": plain[:10], "middle": plain[:5] + plain[-5:]}
    assert prepared.token_ids[1:-1] == expected[side]


def test_the_stage_says_what_a_request_does_not(folder: Path) -> None:
    stage = make_engine(folder, chat_template=True, max_prompt_tokens=LIMIT, truncate_prompt="left")
    assert cut(stage, {"messages": chat(80)}, None)[0].endswith("0.79<|im_end|>\n" + BEGIN)
    assert "0.0" in cut(stage, {"messages": chat(80)}, "right")[0]
    as_diffusers = make_encoder(folder, chat_template=True, max_prompt_tokens=LIMIT, truncate_prompt=True)
    _, prepared = cut(as_diffusers, {"messages": chat(80)}, None)
    whole = make_tokenizer()("".join(map(turn, chat(80))) + BEGIN)["input_ids"]
    assert prepared.token_ids == whole[:LIMIT]
    with pytest.raises(ConfigError, match="truncate_prompt"):
        make_engine(folder, truncate_prompt="up")


def test_a_prompt_that_fits_is_left_as_it_is(engine: Any) -> None:
    text, prepared = cut(engine, {"messages": chat(3)}, "middle")
    assert text == "".join(map(turn, chat(3))) + BEGIN and prepared.num_truncated == 0


def test_without_room_for_any_text_the_prompt_is_refused(folder: Path) -> None:
    engine = make_engine(folder, chat_template=True, max_prompt_tokens=20)
    for side in SIDES:
        with pytest.raises(InvalidRequestError, match=r"expected at most 20.*truncate_prompt does not help"):
            cut(engine, {"messages": [{**SYSTEM, "content": "be kind " * 20}, *chat(5)[1:]]}, side)
    with pytest.raises(InvalidRequestError, match=r"expected at most 20 .*or set truncate_prompt"):
        cut(engine, {"messages": chat(50)}, None)


def test_the_metrics_say_how_many_tokens_went(folder: Path) -> None:
    stage = {"kind": "ar", "model": str(folder), "max_prompt_tokens": 40, "num_blocks": 40}
    config = {"stages": {"text": stage}, "outputs": ["text"], "device": "cpu", "dtype": "float32"}
    with Omni(config, progress=False) as omni:
        (output,) = omni.generate({"prompt": "word " * 100, "truncate_prompt": "left"}, GREEDY)
    whole = make_tokenizer()(turn({"role": "user", "content": "word " * 100}) + BEGIN)["input_ids"]
    metrics = output.metrics["text"]
    assert output.error is None and metrics["prompt_tokens"] <= 40
    assert metrics["truncated_tokens"] == len(whole) - metrics["prompt_tokens"]
