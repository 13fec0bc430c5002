"""The tools around the tiny speaking model's words: sentences, requests, the judge, what the talker is fed."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_speech import assert_loads_whole
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from tools.tiny.speech import synthesise, token2wav, train
from tools.tiny.speech.evaluate import Judged, figures, held_out
from tools.tiny.speech.judge import Verdict, hear, judge, pieces
from tools.tiny.speech.requests import REQUESTS, answer, request
from tools.tiny.speech.shapes import talker_config, thinker_config
from tools.tiny.speech.synthesise import CODE_SAMPLES, NoSynthesiser, Voice, has_synthesiser, speak, split
from tools.tiny.speech.talker_data import NO_WORD, Spoken
from tools.tiny.speech.train_talker import IGNORED, Reader, Text, batch, fresh_model, text_rows
from tools.tiny.speech.train_thinker import chat_prompt, train_tokenizer
from tools.tiny.speech.world import DIGITS, HELD_OUT_SHARE, MAX_WORDS, WORDS, Sentence, is_held_out, sentence
from vllm_omni.engine.ar.talker.inputs import TalkerInputs, TextRows

needs_voice = pytest.mark.skipif(not has_synthesiser(), reason="espeak-ng is not installed")


def some_sentences(count: int, seed: int, *, is_kept: bool = False) -> list[Sentence]:
    rng = random.Random(seed)
    return [sentence(rng, held_out=is_kept) for _ in range(count)]


def test_one_sentence_in_twenty_is_kept_for_judging_and_never_trained_on() -> None:
    rng = random.Random(0)
    drawn = [tuple(rng.choices(WORDS, k=rng.randint(2, MAX_WORDS))) for _ in range(4000)]
    assert 0.8 / HELD_OUT_SHARE < sum(map(is_held_out, drawn)) / len(drawn) < 1.2 / HELD_OUT_SHARE
    assert not any(map(is_held_out, some_sentences(500, 0)))
    assert all(map(is_held_out, some_sentences(50, 0, is_kept=True)))


def test_a_request_says_the_words_in_their_order_and_no_other_word_of_the_world() -> None:
    rng = random.Random(1)
    for words in some_sentences(500, 1):
        asked = re.findall(r"[a-z]+|\d", request(words, rng).lower())
        named = [DIGITS[int(one)] if one.isdigit() else one for one in asked]
        assert tuple(one for one in named if one in WORDS) == words
    assert not set(re.findall("[a-z]+", " ".join(REQUESTS).lower())) & set(WORDS)


def test_every_word_of_the_world_is_one_token_wherever_it_stands() -> None:
    tokenizer = train_tokenizer(0, 4000)
    for word in WORDS:
        assert len(tokenizer(word)["input_ids"]) == len(tokenizer(f" {word}")["input_ids"]) == 1
    messages = [{"role": "user", "content": "read 37"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat_prompt("read 37")
    assert len(tokenizer("37")["input_ids"]) == 2


def test_without_a_synthesiser_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSynthesiser, match="install the package espeak-ng"):
        speak(("three", "red"), Voice(speed=99))


@needs_voice
def test_speech_is_whole_codes_silent_around_every_word_and_the_same_again() -> None:
    words = ("seven", "no", "one", "stop", "triangle")
    samples = speak(words)
    assert samples.dtype == np.float32 and len(samples) % CODE_SAMPLES == 0
    synthesise.synthesised.cache_clear()
    np.testing.assert_array_equal(samples, speak(words))
    windows = np.abs(samples).reshape(-1, CODE_SAMPLES).max(axis=1) == 0
    assert windows[:4].all() and windows[-8:].all()
    assert len(split(samples)) == len(words)


@needs_voice
@pytest.mark.parametrize("voice", [synthesise.VOICE, Voice(speed=165, pitch=30), Voice(speed=115, pitch=85)])
def test_the_judge_hears_other_voices_than_its_own(voice: Voice) -> None:
    verdicts = [judge(words, speak(words, voice)) for words in some_sentences(6, 5, is_kept=True)]
    rights = [word for verdict in verdicts for word in verdict.right]
    assert sum(rights) >= 0.95 * len(rights), [verdict.complaint for verdict in verdicts]


@needs_voice
def test_the_judge_hears_no_word_in_noise_or_silence_and_another_word_in_another() -> None:
    draw = np.random.default_rng(0)
    assert hear(np.zeros(24_000, np.float32)) == ()
    rights = []
    for words in some_sentences(6, 6, is_kept=True):
        speech = speak(words)
        noise = (0.1 * draw.standard_normal(len(speech))).astype(np.float32) * (speech != 0)
        rights += judge(words, noise).right
    assert sum(rights) <= 0.2 * len(rights)
    assert judge(("red", "seven"), speak(("red", "window"))).right == (True, False)


@needs_voice
def test_the_judge_listens_through_a_little_noise_and_at_any_level() -> None:
    words = ("blue", "nine", "window")
    speech = speak(words)
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    assert len(pieces(speech)) == 3
    assert hear(0.05 * (speech + 0.002 * noise)) == words


def test_a_wrong_number_of_words_is_all_wrong() -> None:
    assert Verdict(("red", "blue"), ("red",)).right == (False, False)
    assert Verdict(("red", "blue"), ("red", "green")).right == (True, False)
    assert Verdict(("red",), ("red",)).complaint is None
    assert Verdict(("red",), ()).complaint == "meant red, heard nothing"


def test_requests_for_judging_are_distinct_and_figures_count_words() -> None:
    asked = held_out(40, 0)
    assert len({words for words, _ in asked}) == 40 and all(is_held_out(words) for words, _ in asked)
    verdicts = [Verdict(("red", "blue"), ("red", "two")), Verdict(("red", "red", "red"), ("red",) * 3)]
    found = figures([Judged("", answer(verdict.meant), verdict) for verdict in verdicts])
    assert (found["words"], found["words_heard_right"], found["written_right"]) == (5, 0.8, 1.0)
    assert found["by_number_of_words"] == {"2": 0.0, "3": 1.0}


def test_the_place_of_a_code_is_its_word_a_pause_belongs_to_the_next() -> None:
    codes = (0, 0, 7, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0)
    first, second = WORDS.index("stop"), WORDS.index("red")
    places = Spoken(("stop", "red"), codes).places()
    assert places == [first] * 7 + [second] * 7 + [NO_WORD] * 6


@pytest.fixture(scope="module")
def text() -> Text:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(0, 2000)
    return Text(Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(len(tokenizer))), tokenizer)


def test_the_talker_is_trained_on_what_the_engine_feeds_it(text: Text) -> None:
    ((prompt, reply),) = text.rows(["say red two"], ["red two"])
    config, num_codes = talker_config(16), 6
    end, pad, begin = config.tts_text_end_token_id, config.tts_text_pad_token_id, config.tts_text_start_token_id
    rows = TextRows((text.embeddings[begin],), (text.embeddings[end],), text.embeddings[pad])
    inputs = TalkerInputs(prompt, rows, torch.arange(len(prompt)).expand(3, -1))
    inputs.extend(list(reply), is_last=True)
    spoken = inputs.between(0, len(prompt) + 2 + num_codes)
    assert spoken.rows is not None
    torch.testing.assert_close(text_rows(text, config, prompt, reply, num_codes), spoken.rows.rows)
    assert len(reply) == 2 and len(prompt) == len(text.tokenizer(chat_prompt("say red two"))["input_ids"])


def test_a_row_learns_its_codes_and_the_end_and_nothing_of_the_prompt(text: Text) -> None:
    model = fresh_model(16)
    data = [Spoken(("red",), (0, 3, 4, 0)), Spoken(("two", "stop"), (0, 5, 0, 0, 0, 0, 0, 6, 0))]
    rows, codes, targets, words = batch(text, model.talker, data, random.Random(0))
    end = model.talker.config.tts_codec_end_token_id
    for row, one in zip(targets, data, strict=True):
        assert row[row != IGNORED].tolist() == [*one.codes, end]
    assert rows.shape[:2] == codes.shape == targets.shape == words.shape
    assert bool(((words != IGNORED) == (targets != IGNORED)).all())
    logits, said = Reader(model.talker)(rows, codes)
    assert logits.shape == (*codes.shape, 16 + 5) and said.shape == (*codes.shape, NO_WORD + 1)


@needs_voice
def test_a_quick_training_gives_parts_that_speak_and_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        train.main(["--runs", str(tmp_path / "runs"), "--asset", str(tmp_path / "asset"), "--quick"])
    assert_loads_whole(tmp_path / "asset")
    model, voice = token2wav.trained(tmp_path / "runs"), token2wav.voice(tmp_path / "runs")
    samples = token2wav.spoken(model, voice, torch.tensor([0, 5, 9, 0]), seed=1)
    assert samples.shape == (4 * CODE_SAMPLES,) and bool(samples.isfinite().all())
