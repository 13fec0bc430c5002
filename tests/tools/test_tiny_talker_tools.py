"""The tools that train the small speaking model: what they compute is what the package computes of the folder that they
write, and a training runs from the words to that folder.
"""

from __future__ import annotations

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
from tools.tiny.talker.lessons import END, Lessons, lessons
from tools.tiny.talker.likeness import likeness
from tools.tiny.talker.publish import publish
from tools.tiny.talker.sentences import Sentences, compact, drawn_words
from tools.tiny.talker.shapes import FRAME_SAMPLES, NUM_CODES, NUM_GROUPS, codec_config
from tools.tiny.talker.spoken import GAP, LEAD, NO_WORD, SILENT, TAIL, Spoken
from tools.tiny.talker.text import encoded, words_tokenizer
from tools.tiny.talker.train_codec import Codec
from tools.tiny.talker.train_talker import begun
from vllm_omni.models.qwen3_tts.codec.config import CodecDecoderConfig
from vllm_omni.models.qwen3_tts.codec.decoder import CodecDecoder

ONE, TWO = WORDS.index("one"), WORDS.index("two")
FRAMES = 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two words, each of three frames of noise wherever it stands."""
    torch.manual_seed(0)
    places = torch.zeros(len(WORDS), MAX_WORDS + 1, MAX_WORDS, 2, dtype=torch.int32)
    for number, word in enumerate((ONE, TWO)):
        for length in range(1, MAX_WORDS + 1):
            places[word, length, :length] = torch.tensor([1 + 3 * number, 3])
    samples = (3000 * torch.randn(7, FRAME_SAMPLES)).to(torch.int16)
    samples[SILENT] = 0
    path = tmp_path_factory.mktemp("talker") / "data.safetensors"
    save_file({"samples": samples, "places": places, **encoded(words_tokenizer())}, path)
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


def lesson(spoken: Spoken, words: list[int], text: str, *, is_named: bool, is_whole: bool) -> Lessons:
    tokens = torch.tensor([Tokenizer.from_str(spoken.tokenizer.decode()).encode(text).ids])
    asked = Sentences(torch.tensor([words + [-1] * (MAX_WORDS - len(words))]), tokens)
    return lessons(spoken, asked, torch.tensor([is_named]), torch.tensor([is_whole]))


@pytest.mark.parametrize("is_whole", [False, True], ids=["text beside the frames", "text before them"])
def test_the_published_talker_writes_what_was_trained(spoken: Spoken, tmp_path: Path, is_whole: bool) -> None:
    torch.manual_seed(0)
    talker, codec = fresh_talker(spoken.vocab_size), random_codec()
    publish(tmp_path, spoken, codec, talker)
    for parameter in talker.parameters():
        parameter.data = rounded(parameter)
    text = "one, 2!"
    case = Case("said", "custom_voice", text, "auto" if is_whole else "english", streams_text=not is_whole)
    codes, logits, residual = Talkers({"custom_voice": tmp_path}).speak(case, FRAMES)
    taught = lesson(spoken, [ONE, TWO], text, is_named=not is_whole, is_whole=is_whole)
    texts, marks = taught.text, taught.marks
    prompt = int((taught.frames < 0).sum())
    fed = torch.full((1, prompt + FRAMES, NUM_GROUPS), -1)
    fed[0, prompt:] = codes[:FRAMES]
    states, _ = layers(talker.decoder, rows_of(talker, texts[:, : prompt + FRAMES], marks[:, : prompt + FRAMES], fed))
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
    taught = lesson(spoken, [ONE, TWO], "one two", is_named=True, is_whole=True)
    text, marks, frames, following, words = (getattr(taught, name)[0].tolist() for name in Lessons.__slots__)
    expected = spoken.frames([ONE, TWO])
    assert expected == [SILENT] * LEAD + [1, 2, 3] + [SILENT] * GAP + [4, 5, 6] + [SILENT] * TAIL
    prompt = frames.count(-1)
    assert frames[prompt:] == expected and following[prompt - 1 :] == [*expected, END]
    assert words[prompt - 1 : -1] == [ONE] * (LEAD + 3) + [TWO] * (GAP + 3) + [NO_WORD] * TAIL
    assert len(text) == len(marks) == len(frames) == len(following) == len(words)


def test_sentences_are_drawn_anew_without_those_that_are_held_out_and_written_in_many_ways(spoken: Spoken) -> None:
    torch.manual_seed(0)
    drawn, others = Sentences.drawn(spoken, 3000), Sentences.drawn(spoken, 3000)
    assert not torch.equal(drawn.words, others.words)
    said = [tuple(WORDS[word] for word in row if word >= 0) for row in drawn.words.tolist()]
    assert not any(map(is_held_out, said)) and {len(words) for words in said} == set(range(1, MAX_WORDS + 1))
    assert all(is_held_out(tuple(WORDS[word] for word in row if word >= 0)) for row in held_out(spoken).tolist())
    tokenizer = Tokenizer.from_str(spoken.tokenizer.decode())
    texts = [tokenizer.decode([token for token in row if token >= 0]) for row in drawn.tokens.tolist()]
    assert {"One", "one", "1", "two.", "2!", "One two", "one, two", "1 2", "Two, one."} <= set(texts)
    rows = [[token for token in row if token >= 0] for row in drawn.tokens.tolist()]
    assert [tokenizer.encode(text).ids for text in texts] == rows


def held_out(spoken: Spoken) -> Tensor:
    return drawn_words(spoken.known, 3, held_out=True)


def test_lessons_of_many_sentences_are_those_of_each(spoken: Spoken) -> None:
    torch.manual_seed(0)
    asked, flags = Sentences.drawn(spoken, 6), torch.arange(6)
    many = lessons(spoken, asked, flags % 2 == 0, flags % 3 == 0)
    for place in range(6):
        alone = lessons(
            spoken,
            Sentences(asked.words[place, None], compact(asked.tokens[place, None])),
            flags[place, None] % 2 == 0,
            flags[place, None] % 3 == 0,
        )
        for name in Lessons.__slots__:
            row = getattr(many, name)[place]
            length = getattr(alone, name).shape[1]
            assert torch.equal(row[:length], getattr(alone, name)[0]) and (row[length:] == -1).all(), name


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
    vocab_size = Spoken.load(data).vocab_size
    kept, again = (begun(vocab_size, tmp_path / name).talker for name in ("talker.safetensors", "tiny-talker"))
    for one, other in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(rounded(one), other)
