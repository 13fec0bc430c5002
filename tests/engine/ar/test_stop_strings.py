"""Where a text stops: the same however it was divided into tokens, at once, and never a part of a stop string shown."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.support.ar import make_engine, make_model_folder, make_task, make_tokenizer, submit
from tests.support.steering import steer
from vllm_omni import SamplingParams
from vllm_omni.engine.ar.stop_strings import StopStrings
from vllm_omni.engine.ar.text_stream import StopRules, TextStream
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import InvalidRequestError

CHARACTERS = "ab<é你😀"
SPECIAL = ("<|x|>", "<|y|>")
BYTES = sorted(set(CHARACTERS.encode()))


def letters() -> dict[int, str]:
    """Byte -> the character that a byte-level tokenizer writes for it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    """A token for every one, two or three of the bytes of CHARACTERS, and the special ones."""
    letter = letters()
    pieces = [bytes(piece) for size in (1, 2, 3) for piece in product(BYTES, repeat=size)]
    vocabulary = {"".join(letter[byte] for byte in piece): number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=letter[BYTES[0]]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return TextProcessor(folder)


def token_ids(processor: TextProcessor, text: list[str], cuts: list[int]) -> list[list[int]]:
    """Of each item of a text (characters and special tokens) in turn, the tokens of pieces of these sizes."""
    vocabulary = processor.tokenizer.get_vocab()
    letter = letters()
    found: list[list[int]] = []
    run = b""
    sizes = iter(cuts * (1 + len(text) * 4))

    def flush() -> None:
        nonlocal run
        while run:
            size = next(sizes)
            found.append([vocabulary["".join(letter[byte] for byte in run[:size])]])
            run = run[size:]

    for item in text:
        if item in SPECIAL:
            flush()
            found.append([vocabulary[item]])
        else:
            run += item.encode()
    flush()
    return found


def expected(text: list[str], stop: list[str], skip: bool) -> tuple[str, int | None]:
    """The text before the stop string that ends first, the longest of those, and after which item; by trying all."""
    for end in range(1, len(text) + 1):
        items = text[:end]
        if skip and items[-1] not in SPECIAL:
            shown = "".join(item for item in items if item not in SPECIAL)
            lengths = [len(string) for string in stop if shown.endswith(string)]
        else:
            shown, lengths = "", []
        whole = "".join(items)
        for string in stop:
            if whole.endswith(string) and (not skip or any(special in string for special in SPECIAL)):
                hidden = sum(string.count(special) * len(special) for special in SPECIAL) if skip else 0
                lengths.append(len(string) - hidden)
        if lengths:
            visible = "".join(item for item in items if not (skip and item in SPECIAL))
            return visible[: len(visible) - max(lengths)], end
    return "".join(item for item in text if not (skip and item in SPECIAL)), None


ITEMS = st.lists(st.sampled_from([*CHARACTERS.replace("<", ""), *SPECIAL]), min_size=1, max_size=14)


@settings(max_examples=300, deadline=None)
@given(
    text=ITEMS,
    cuts=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    others=st.lists(st.sampled_from(["a", "ab", "é你", "<|x|>", "a<|x|>", "<|x|><|y|>b", "bb"]), max_size=2),
    start=st.integers(0, 12),
    size=st.integers(1, 4),
    skip=st.booleans(),
)
@example(text=["a", "<|y|>", "<|x|>", "a", "a", "<|x|>"], cuts=[1], others=[], start=4, size=2, skip=True)
def test_the_text_is_that_before_the_first_stop_string(
    processor: TextProcessor, text: list[str], cuts: list[int], others: list[str], start: int, size: int, skip: bool
) -> None:
    stop = [string for string in ("".join(text[start : start + size]), *others) if string]
    stream = TextStream(processor, StopRules(processor, stop, skip), skip)
    wanted, end = expected(text, stop, skip)
    shown = ""
    tokens = [token for group in token_ids(processor, text, cuts) for token in group]
    for number, token in enumerate(tokens):
        shown += pushed(stream, token)
        assert wanted.startswith(shown), "no part of a stop string, no half character"
        known = processor.decode(tokens[: number + 1], False)
        if end is not None and known.startswith("".join(text[:end])):
            assert stream.is_stopped, "at the very token that brings its end"
        if stream.is_stopped:
            break
    stream.finish()
    shown += stream.give()
    assert shown == stream.text == wanted and stream.is_stopped == (end is not None)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=30), strings=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=6)
)
def test_the_automaton_finds_what_a_search_finds(text: str, strings: list[str]) -> None:
    stop = StopStrings(strings)
    state = 0
    for end in range(1, len(text) + 1):
        state = stop.advance(state, text[end - 1])
        before = text[:end]
        found = [len(string) for string in strings if before.endswith(string)]
        assert stop.ending(state) == max(found, default=None)
        begun = [n for string in strings for n in range(1, len(string)) if before.endswith(string[:n])]
        assert stop.held(state) == max(begun, default=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


SPECIAL_CASES: dict[str, tuple[Any, str, str]] = {
    "a special token": (["<|im_start|>"], "one<|im_start|>two", "one"),
    "one behind a text": (["\n<|im_start|>"], "one\ntwo\n<|im_start|>", "one\ntwo"),
    "one before a text": (["<|im_start|>us"], "one<|im_start|>as<|im_start|>user", "oneas"),
    "two of them": (["<|im_start|><|endoftext|>"], "a<|im_start|>b<|im_start|><|endoftext|>", "ab"),
    "words that a hidden token parts": (["ab"], "xa<|im_start|>b", "x"),
}


@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_special_tokens_in_stop_strings_end_a_text_that_does_not_show_them(folder: Path, name: str) -> None:
    stop, written, text = SPECIAL_CASES[name]
    ids = make_tokenizer()(written)["input_ids"]
    engine = make_engine(folder)
    submit(engine, make_task("a", SamplingParams(temperature=0, max_tokens=len(ids) + 2, ignore_eos=True, stop=stop)))
    events = steer(engine, ids)
    meta = events[-1].payload.meta
    assert (meta["text"], meta["finish_reason"]) == (text, "stop")
    assert "".join(event.text for event in events[:-1]) == text


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("stop", ["<|x|>", "a<|x|>"])
def test_half_a_character_before_a_stopping_token_is_part_of_the_text(
    processor: TextProcessor, stop: str, skips: bool
) -> None:
    (a,), half, (x,) = (
        token_ids(processor, ["a"], [1])[0],
        token_ids(processor, ["你"], [1])[0],
        [processor.special_tokens["<|x|>"]],
    )
    stream = TextStream(processor, StopRules(processor, [stop], skips), skips)
    pieces = [pushed(stream, token) for token in (a, half[0], x)]
    assert stream.is_stopped == (stop == "<|x|>")
    stream.finish()
    pieces.append(stream.give())
    shown = "" if skips or stream.is_stopped else "<|x|>"
    assert stream.text == "".join(pieces) == f"a\N{REPLACEMENT CHARACTER}{shown}"


def pushed(stream: TextStream, token: int) -> str:
    stream.push([token])
    return stream.give()


def test_words_within_a_hidden_token_end_nothing(processor: TextProcessor) -> None:
    text = ["a", "<|x|>", "b"]
    stream = TextStream(processor, StopRules(processor, ["|x|"], True), True)
    for group in token_ids(processor, text, [1]):
        stream.push([group[0]])
    assert stream.text == "ab" and not stream.is_stopped


def test_many_long_stop_strings_cost_a_step_nothing(processor: TextProcessor) -> None:
    rules = StopRules(processor, ["a" * 99 + chr(0x4E00 + number) for number in range(99)], True)
    stream = TextStream(processor, rules, True)
    (token,) = token_ids(processor, ["a"], [1])[0]
    began = time.perf_counter()
    for _ in range(2000):
        pushed(stream, token)
    assert time.perf_counter() - began < 5 and stream.text == "a" * 2000


def test_stop_strings_are_limited() -> None:
    with pytest.raises(InvalidRequestError, match="stop: got 10001 characters in all, expected at most 10000"):
        SamplingParams(stop=["a" * 5000, "b" * 5001])
