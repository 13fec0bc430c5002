"""The tools that train the small speaking model: what they compute is what the package computes of the folder that they
write, and a training runs from the words to that folder.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.qwen3_tts import Case
from support.talkers import Talkers
from tokenizers import Tokenizer
from torch import Tensor

from tools.tiny.speech.world import MAX_WORDS, WORDS, is_held_out
from tools.tiny.talker import train
from tools.tiny.talker.coding import Books, Encoder
from tools.tiny.talker.decoding import Wave, coded, decode, fresh_decoder
from tools.tiny.talker.foretelling import first_logits, fresh_talker, layers, other_logits, rows_of
from tools.tiny.talker.lessons import END, lesson
from tools.tiny.talker.likeness import likeness
from tools.tiny.talker.publish import publish
from tools.tiny.talker.shapes import FRAME_SAMPLES, NUM_CODES, NUM_GROUPS, codec_config
from tools.tiny.talker.spoken import GAP, LEAD, NO_WORD, SILENT, TAIL, Spoken, padded, written
from tools.tiny.talker.text import encoded, trained_tokenizer
from tools.tiny.talker.train_codec import Codec
from vllm_omni.models.qwen3_tts.codec.config import CodecDecoderConfig
from vllm_omni.models.qwen3_tts.codec.decoder import CodecDecoder

SENTENCES = (("two", "one"), ("one", "two"), ("two",), ("one",))
FRAMES = 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two words, each of three frames of noise wherever it stands."""
    torch.manual_seed(0)
    places = torch.zeros(len(WORDS), MAX_WORDS + 1, MAX_WORDS, 2, dtype=torch.int32)
    for number, word in enumerate(("one", "two")):
        for length in (1, 2):
            places[WORDS.index(word), length, :length] = torch.tensor([1 + 3 * number, 3])
    samples = (3000 * torch.randn(7, FRAME_SAMPLES)).to(torch.int16)
    samples[SILENT] = 0
    texts = [" ".join(words) for words in SENTENCES]
    tokenizer = trained_tokenizer(texts)
    role, tokens = encoded(tokenizer, texts)
    path = tmp_path_factory.mktemp("talker") / "data.safetensors"
    content = {
        "samples": samples,
        "places": places,
        "sentences": padded([torch.tensor([WORDS.index(word) for word in words]) for words in SENTENCES], MAX_WORDS),
        "tokens": padded(tokens),
        "role": torch.tensor(role),
        "tokenizer": torch.tensor(list(tokenizer.to_str().encode()), dtype=torch.uint8),
        "vocab_size": torch.tensor(tokenizer.get_vocab_size()),
    }
    save_file(content, path)
    return path


@pytest.fixture(scope="module")
def spoken(data: Path) -> Spoken:
    return Spoken.load(data)


def random_codec() -> Codec:
    torch.manual_seed(1)
    codes = torch.randint(NUM_CODES, (7, NUM_GROUPS))
    return Codec(
        fresh_decoder(),
        torch.randn(NUM_GROUPS, NUM_CODES, codec_config()["decoder_config"]["codebook_dim"] // 2),
        codes,
    )


def rounded(tensor: Tensor) -> Tensor:
    """As it is published."""
    return tensor.detach().bfloat16().float()


@pytest.mark.parametrize("number", [0, 1], ids=["text beside the frames", "text before them"])
def test_the_published_talker_writes_what_was_trained(spoken: Spoken, tmp_path: Path, number: int) -> None:
    torch.manual_seed(number)
    talker, codec = fresh_talker(spoken.vocab_size), random_codec()
    publish(tmp_path, spoken, codec, talker)
    for parameter in talker.parameters():
        parameter.data = rounded(parameter)
    tokens = spoken.tokens[number]
    text = Tokenizer.from_str(spoken.tokenizer.decode()).decode(tokens[tokens >= 0].tolist())
    assert text == " ".join(SENTENCES[number])
    case = Case("said", "custom_voice", text, "auto" if number else "english", streams_text=number == 0)
    codes, logits, residual = Talkers({"custom_voice": tmp_path}).speak(case, FRAMES)
    texts, marks, frames, _, _ = (torch.tensor(column) for column in lesson(spoken, number))
    prompt = int((frames < 0).sum())
    fed = torch.full((1, prompt + FRAMES, NUM_GROUPS), -1)
    fed[0, prompt:] = codes[:FRAMES]
    states, _ = layers(
        talker.decoder, rows_of(talker, texts[None, : prompt + FRAMES], marks[None, : prompt + FRAMES], fed)
    )
    mine = first_logits(talker, states)[0, prompt - 1 :]
    torch.testing.assert_close(mine[: len(logits)], logits, rtol=1e-4, atol=1e-4)
    others = other_logits(talker, states[0, prompt - 1 : prompt + FRAMES - 1], codes)
    seen = residual.view(-1, NUM_GROUPS - 1, NUM_CODES)
    torch.testing.assert_close(others[: len(seen)], seen, rtol=1e-4, atol=1e-4)


def test_the_published_decoder_gives_the_samples_that_were_trained(spoken: Spoken, tmp_path: Path) -> None:
    codec = random_codec()
    publish(tmp_path, spoken, codec, fresh_talker(spoken.vocab_size))
    config = CodecDecoderConfig.of_residual_codes(codec_config()["decoder_config"], "decoder_config")
    loaded = CodecDecoder.load(config, tmp_path / "speech_tokenizer", "decoder.", CPU, torch.float32)
    for parameter in codec.decoder.parameters():
        parameter.data = rounded(parameter)
    codes = torch.randint(NUM_CODES, (2, 9, NUM_GROUPS))
    mine = decode(codec.decoder, coded(codec.decoder, rounded(codec.rows), codes))
    torch.testing.assert_close(mine.clamp(-1, 1), loaded(codes, loaded.begin(2), is_first=True), rtol=1e-4, atol=1e-5)


def test_the_slopes_of_the_wave_are_right() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 4), torch.rand(3, 1), torch.rand(3, 1)]
    assert torch.autograd.gradcheck(Wave.apply, [one.double().requires_grad_() for one in inputs])


def test_books_fitted_to_few_vectors_give_them_back_and_silence_has_the_code_zero() -> None:
    torch.manual_seed(0)
    books, latent = Books(), torch.randn(100, 128)
    books.refit(latent)
    codes = books.codes(latent)
    assert len(codes.unique(dim=0)) == 100
    torch.testing.assert_close(books.rows[0][codes[:, 0]], books.first(latent).detach(), rtol=1e-4, atol=1e-4)
    assert not books.codes(torch.zeros(1, 128)).any()
    assert not Encoder()(torch.zeros(1, 4 * FRAME_SAMPLES)).any()


def test_a_lesson_is_the_prompt_then_every_frame_and_the_end(spoken: Spoken) -> None:
    text, marks, frames, following, words = lesson(spoken, 1)
    said = [WORDS.index("one"), WORDS.index("two")]
    expected = [SILENT] * LEAD + [1, 2, 3] + [SILENT] * GAP + [4, 5, 6] + [SILENT] * TAIL
    prompt = frames.count(-1)
    assert frames[prompt:] == expected and following[prompt - 1 :] == [*expected, END]
    assert words[prompt - 1 : -1] == [said[0]] * (LEAD + 3) + [said[1]] * (GAP + 3) + [NO_WORD] * TAIL
    assert len(text) == len(marks) == len(frames) == len(following) == len(words)


def test_sentences_are_written_in_ways_that_keep_their_words() -> None:
    rng = random.Random(0)
    texts = {written(("three", "red"), rng) for _ in range(200)}
    assert {"three red", "3 red", "Three, red.", "three red!"} <= texts
    assert not is_held_out(("three",))


def test_likeness_knows_a_rough_voice_and_a_higher_one() -> None:
    time_s = torch.arange(24_000) / 24_000
    voice = sum(torch.sin(2 * torch.pi * 120 * k * time_s) / k for k in range(1, 9)) * 0.1
    higher = sum(torch.sin(2 * torch.pi * 127.14 * k * time_s) / k for k in range(1, 9)) * 0.1
    torch.manual_seed(0)
    same, rough = likeness(voice, voice), likeness(voice + 0.1 * torch.randn(24_000), voice)
    assert (same.periodicity, same.pitch, same.mel) == (0, 0, 0)
    assert rough.periodicity > 0.2 and rough.mel > 0.5
    assert likeness(higher, voice).pitch == pytest.approx(1, abs=0.2)


def test_a_quick_training_writes_a_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.train_codec, "PIECE", 4)
    train.main(["--data", str(data), "--folder", str(tmp_path), "--device", "cpu", "--quick"])
    parts = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if line]
    assert len(parts) >= 2 and "nan" not in "".join(parts).lower()
    assert sum(file.stat().st_size for file in (tmp_path / "tiny-talker").rglob("*")) < 16e6
