"""What the shipped speaking model writes and says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.tiny_speech import assert_loads_whole
from transformers import AutoTokenizer

from tools.tiny.speech.evaluate import figures, held_out, judged
from tools.tiny.speech.synthesise import has_synthesiser
from vllm_omni import DiffusionParams, Omni, SamplingParams
from vllm_omni.utils.files import assets_folder

MAX_BYTES = 20 * 2**20
FOLDER = assets_folder() / "tiny-speech"
WHOLE = (
    "stages.talker.inputs={prompt_states: thinker.prompt_states, prompt_positions: thinker.prompt_positions, "
    "reply_states: thinker.reply_states}",
    "stages.token2wav.inputs={codes: talker.codes}",
)
needs_voice = pytest.mark.skipif(not has_synthesiser(), reason="espeak-ng is not installed")


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    with Omni("tiny_speech.yaml", progress=False) as loaded:
        yield loaded


def test_the_shipped_folder_is_small_and_transformers_loads_it_whole() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= MAX_BYTES
    assert_loads_whole(FOLDER)
    conversation = [{"role": "user", "content": [{"type": "text", "text": "read 3 7 red"}]}]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    read = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert read == "<|im_start|>user\nread 3 7 red<|im_end|>\n<|im_start|>assistant\n"


@needs_voice
def test_the_shipped_model_says_what_it_is_asked_to(omni: Omni) -> None:
    """A small sample of what tools/tiny/speech/evaluate.py measures; wide enough not to fail by chance at the goal."""
    found = judged(omni, held_out(10, seed=77), seed=1)
    shares = figures(found)
    complaints = [one.verdict.complaint for one in found]
    assert shares["written_right"] >= 0.9, [one.written for one in found]
    assert shares["words_heard_right"] >= 0.8, complaints


@pytest.mark.parametrize("request_", ["read 3 7 red", "please say three seven red", "Can you read out: 3 7 red?"])
def test_figures_and_loose_words_become_words(omni: Omni, request_: str) -> None:
    (output,) = omni.generate(request_, DiffusionParams(seed=1))
    assert output.error is None and output.text == "three seven red"
    speech = output.audios[0]
    assert speech.sample_rate == 24_000 and speech.samples.dtype == np.float32 and speech.samples.shape[0] == 1
    assert 1.0 < speech.duration_s < 3.5 and 0.05 < np.abs(speech.samples).max() <= 1.0


def test_longer_sentences_take_longer(omni: Omni) -> None:
    prompts = ["say red", "say red blue", "say red blue star left"]
    lengths = [output.audios[0].duration_s for output in omni.generate(prompts, DiffusionParams(seed=1))]
    assert lengths[0] + 0.3 < lengths[1] < lengths[2] - 0.3


def test_speech_is_the_same_alone_in_a_crowd_and_in_pieces(omni: Omni) -> None:
    prompts = ["say seven", "read 3 7 red", "green square, happy"]
    crowd = omni.generate(prompts, DiffusionParams(seed=3))
    for prompt, together in zip(prompts, crowd, strict=True):
        (alone,) = omni.generate(prompt, DiffusionParams(seed=3))
        np.testing.assert_allclose(alone.audios[0].samples, together.audios[0].samples, atol=1e-4)
    *parts, whole = omni.stream(prompts[1], DiffusionParams(seed=3))
    assert len([part for part in parts if part.audios]) > 1
    np.testing.assert_allclose(whole.audios[0].samples, crowd[1].audios[0].samples, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", None, ("", "stop")),
        ("say seven", {"thinker": SamplingParams(max_tokens=1)}, ("seven", "length")),
        ("say seven", {"talker": SamplingParams(stop_token_ids=list(range(60)))}, ("seven", "stop")),
    ],
    ids=["no words", "one token", "the talker ends at once"],
)
@pytest.mark.parametrize("edges", [(), WHOLE], ids=["streamed", "whole"])
def test_a_reply_whose_speech_comes_to_nothing_has_its_words_and_audio_of_no_length(
    prompt: str, params: Any, words: tuple[str, str], edges: tuple[str, ...]
) -> None:
    with Omni("tiny_speech", overrides=edges) as omni:
        (output,) = omni.generate(prompt, params)
        *parts, streamed = omni.stream(prompt, params)
        for final in (output, streamed):
            assert final.error is None and (final.text, final.finish_reason) == words
            (audio,) = final.audios
            assert audio.samples.shape == (1, 0) and audio.sample_rate == 24_000
        assert "".join(part.text or "" for part in parts) == words[0] and not any(part.audios for part in parts)
        omni._executor.check_integrity()
