"""What the shipped talker says: held-out sentences, word by word as they were recorded, whole and in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tools.tiny.speech.evaluate import held_out, share
from tools.tiny.speech.judge import judge
from tools.tiny.speech.synthesise import has_synthesiser
from vllm_omni import Omni
from vllm_omni.utils.files import assets_folder

MAX_BYTES = 16_000_000
FOLDER = assets_folder() / "tiny-talker"
needs_voice = pytest.mark.skipif(not has_synthesiser(), reason="espeak-ng is not installed")


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    with Omni("tiny_talker", progress=False) as loaded:
        yield loaded


def test_the_shipped_folder_is_small_and_says_whose_it_is() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= MAX_BYTES
    assert "Apache-2.0" in (FOLDER / "README.md").read_text(encoding="utf-8")


@needs_voice
def test_the_shipped_talker_says_sentences_that_it_never_learnt(omni: Omni) -> None:
    """A small sample of what tools/tiny/talker/evaluate.py measures; wide enough not to fail by chance at the goal."""
    asked = [words for words, _ in held_out(10, seed=77)]
    outputs = omni.generate([" ".join(words) for words in asked])
    found = [judge(words, output.audios[0].samples[0]) for words, output in zip(asked, outputs, strict=True)]
    complaints = [one.complaint for one in found]
    assert share([word for one in found for word in one.right]) >= 0.9, complaints


def test_however_words_are_written_and_laid_out_they_sound_the_same(omni: Omni) -> None:
    ways = ["three seven red", "3 7 red", "Three, seven, red!"]
    *written, beside = omni.generate([*ways, {"prompt": ways[0], "non_streaming_mode": False}])
    samples = [output.audios[0].samples for output in (*written, beside)]
    assert samples[0].dtype == np.float32
    assert 1.0 < written[0].audios[0].duration_s < 3.5 and 0.05 < np.abs(samples[0]).max() <= 1.0
    for other in samples[1:]:
        np.testing.assert_allclose(other, samples[0], atol=1e-4)


def test_speech_is_the_same_alone_in_a_crowd_and_in_pieces(omni: Omni) -> None:
    prompts = ["seven", "three seven red", "green square happy window five"]
    crowd = omni.generate(prompts)
    lengths = [output.audios[0].duration_s for output in crowd]
    assert lengths[0] + 0.5 < lengths[1] < lengths[2] - 0.5
    *parts, whole = omni.stream(prompts[1])
    pieces = [part.audios[0].samples for part in parts if part.audios]
    assert len(pieces) > 3 and all(output.error is None for output in (*crowd, whole))
    for other in (np.concatenate(pieces, axis=1), whole.audios[0].samples):
        np.testing.assert_allclose(other, crowd[1].audios[0].samples, atol=1e-4)
