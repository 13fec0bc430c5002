"""A text that comes in pieces is said as the whole text is, wherever it is cut and whenever it comes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.ar import assert_clean, drain, is_busy, submit
from support.qwen3_tts import Case, cases, write_folder
from support.talkers import Talkers, codes_of, make_task
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import InvalidRequestError
from vllm_omni.messages import StageEvent, StageFailed, StageTask
from vllm_omni.models.qwen3_tts.request import TURN_BEGIN, TURN_END
from vllm_omni.models.qwen3_tts.turn_reader import TurnReader
from vllm_omni.params import SamplingParams
from vllm_omni.payload import StreamChunk

CASES = cases()
FRAMES = {"speaker": 36, "in_context_long_text": 26, "in_context_short_text": 5}  # a little beyond the text of each
ATOMS = ("a", "é", "e\u0301", "Z", "7", "你", "好", " ", "  ", "\t", "\n", "\r\n", "\u3000", "\x85", "\u200b", "🙂")
MARKS = (".", ",", "!", "…", "。", "，", "、", "'s", "'", '"', "(", "-", "_", "<|im_end|>", "<|", "hello", " world")


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Talkers:
    return Talkers({task: write_folder(tmp_path_factory.mktemp(task), task) for task in ("custom_voice", "base")})


@pytest.fixture(scope="module")
def processor(talkers: Talkers) -> TextProcessor:
    return TextProcessor(talkers.folders["base"], chat_template=False)


def read(processor: TextProcessor, pieces: Sequence[str], **limits: int) -> list[int]:
    reader = TurnReader(cache(processor.encode), LimitsConfig(**limits))
    rows = [reader.read(piece, is_last=False) for piece in pieces]
    return torch.cat([*rows, reader.read("", is_last=True)]).tolist()


def cut(text: str, places: Sequence[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[low:high] for low, high in zip(bounds, bounds[1:], strict=False)]


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.sampled_from(ATOMS + MARKS), min_size=1, max_size=14).map("".join).filter(str.strip),
    places=st.lists(st.integers(0, 60), max_size=8),
)
@example(text="e\u0301 e", places=[1, 2, 3])
@example(text="\n\n a.\n b", places=[1, 2, 3, 4, 5, 6])
def test_pieces_give_the_tokens_of_the_whole(processor: TextProcessor, text: str, places: list[int]) -> None:
    whole = processor.encode(f"{TURN_BEGIN}{text}{TURN_END}")[:-5]
    assert read(processor, cut(text, places)) == whole == read(processor, list(text))


def test_words_are_read_once_the_next_begins(processor: TextProcessor) -> None:
    reader = TurnReader(processor.encode, LimitsConfig())
    counts = [len(reader.read(piece, is_last=False)) for piece in ("hel", "lo", "", " wor", "ld, wo", "rld")]
    assert counts == [0, 0, 0, 4, 2, 0], "role and 'hello', then ' world' and ','"
    assert len(reader.read("", is_last=True)) == 1


def test_what_says_nothing_or_too_much_is_refused(processor: TextProcessor) -> None:
    for pieces in ([], ["", " "], ["\n"]):
        with pytest.raises(InvalidRequestError, match="expected words"):
            read(processor, pieces)
    read(processor, ["abc", "d"], max_prompt_chars=4)
    with pytest.raises(InvalidRequestError, match="got 5 characters, expected at most 4"):
        read(processor, ["abc", "de"], max_prompt_chars=4)


def tokens_of(processor: TextProcessor, case: Case) -> Tensor:
    return torch.tensor(processor.encode(f"{TURN_BEGIN}{case.text}{TURN_END}")[:-5])


def params_of(case: Case, seed: int = 0) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=FRAMES[case.name], min_tokens=FRAMES[case.name])


def open_task(case: Case, name: str, seed: int = 0) -> StageTask:
    task = make_task(case, params_of(case, seed), name)
    return dataclasses.replace(task, request=dataclasses.replace(task.request, prompt="", is_open=True))


def say_in_pieces(engine: AREngine, tokens: dict[str, Tensor], chance: random.Random) -> list[StageEvent]:
    """Each is given some tokens now and then, also none, and stands still now and then; the last chunk may be empty."""
    events, given = list[StageEvent](), dict.fromkeys(tokens, 0)
    left = dict(tokens)
    while left or is_busy(engine):
        for name, rows in list(left.items()):
            if chance.random() < 0.3:
                start, stop = given[name], min(given[name] + chance.randint(0, 6), len(rows))
                is_last = stop == len(rows) and chance.random() < 0.5
                engine.feed(name, "text", StreamChunk(rows[start:stop], start, is_last=is_last))
                given[name] = stop
                if is_last:
                    del left[name]
            (engine.pause if chance.random() < 0.3 else engine.resume)(name)
        events += engine.step()
        engine.check_integrity()
        if not left:
            for name in tokens:
                engine.resume(name)
    return events


def until_begun(engine: AREngine, *names: str) -> list[StageEvent]:
    """Their recordings are read in the background."""
    events: list[StageEvent] = []
    while not engine._jobs.keys() >= set(names):
        events += engine.step()
    return events


@pytest.mark.parametrize("name", FRAMES)
def test_pieces_give_the_codes_of_the_whole(talkers: Talkers, processor: TextProcessor, name: str) -> None:
    """Two beside one that is aborted, in a pool that is too small for both."""
    case, ids = CASES[name], {"a": 3, "b": 4}
    tokens = tokens_of(processor, case)
    whole = talkers.engine(case, (), streamed=("codes",))
    submit(whole, *(make_task(case, params_of(case, seed), each) for each, seed in ids.items()))
    expected = until_begun(whole, *ids)
    spoken = whole._jobs["a"]
    expected += drain(whole)
    engine = talkers.engine(case, (), streamed=("codes",), num_blocks=16, prefix_caching=False)
    submit(engine, *(open_task(case, each, seed) for each, seed in ids.items()), open_task(case, "gone"))
    until_begun(engine, *ids, "gone")
    engine.feed("gone", "text", StreamChunk(tokens[:5]))
    drain(engine)
    engine.abort("gone")
    job = engine._jobs["a"]
    events = say_in_pieces(engine, dict.fromkeys(ids, tokens), random.Random(name))
    for each in ids:
        assert len(codes_of(expected, each)) == FRAMES[name]
        torch.testing.assert_close(codes_of(events, each), codes_of(expected, each), rtol=0, atol=0)
    assert job.sequences[0].content_ids == spoken.sequences[0].content_ids, "what the prefix cache compares"
    assert (engine.get_stats()["num_preemptions"] > 0) == (name != "in_context_short_text")
    assert_clean(engine)


def test_it_stands_still_without_the_next_word_and_holds_up_nobody(talkers: Talkers, processor: TextProcessor) -> None:
    case = CASES["speaker"]
    engine, tokens = talkers.engine(case, (), streamed=("codes",)), tokens_of(processor, case)
    submit(engine, open_task(case, "waits"), open_task(case, "has no word"))
    engine.feed("waits", "text", StreamChunk(tokens[:6]))
    spoken = drain(engine)
    assert len(codes_of(spoken, "waits")) == 3, "one of the prompt, one for each further word"
    assert not is_busy(engine) and engine.step() == []
    submit(engine, make_task(case, SamplingParams(max_tokens=4, min_tokens=4), "other"))
    assert len(codes_of(drain(engine), "other")) == 4
    for name in ("waits", "has no word"):
        engine.abort(name)
    assert_clean(engine)


def test_a_text_of_no_words_fails_its_task_alone(talkers: Talkers) -> None:
    engine = talkers.engine(CASES["speaker"], (), streamed=("codes",))
    submit(engine, open_task(CASES["speaker"], "empty"))
    engine.feed("empty", "text", StreamChunk(torch.empty(0), is_last=True))
    (failed,) = drain(engine)
    assert isinstance(failed, StageFailed) and "expected words behind the role" in str(failed.error)
    assert_clean(engine)
