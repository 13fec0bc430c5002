"""What is trained on: every word as it is said at every place of a sentence, on the grid of frames; sentences of such
words, and their tokens. One safetensors file holds it, so that training needs neither synthesiser nor tokenizer.

    python -m tools.tiny.talker.spoken runs/tiny-talker/data.safetensors
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tiny.speech.world import DIGITS, MAX_WORDS, WORDS, Sentence, sentence
from tools.tiny.talker.shapes import FRAME_SAMPLES

LEAD, GAP, TAIL = 1, 2, 2  # silent frames before the first word, between words and after the last
SILENT, PADDING = 0, -1
NO_WORD = len(WORDS)
TAKES = 5  # of a word at its place, among other words; the one that is said most often counts


@dataclass(frozen=True, slots=True)
class Spoken:
    """All int64 but the samples."""

    samples: Tensor  # [F, 1920] float32, every frame of all words; the first is silence
    places: Tensor  # [words, MAX_WORDS + 1, MAX_WORDS, 2]: by word, length of sentence and place: first frame, number
    sentences: Tensor  # [S, MAX_WORDS] word numbers, PADDING behind
    tokens: Tensor  # [S, n] text tokens of the words, PADDING behind
    role: Tensor  # [3]: what a turn begins with
    tokenizer: bytes  # tokenizer.json
    vocab_size: int

    @classmethod
    def load(cls, path: Path) -> Spoken:
        found = load_file(path)
        return cls(
            found["samples"].float() / 2**15,
            found["places"].long(),
            found["sentences"].long(),
            found["tokens"].long(),
            found["role"].long(),
            found["tokenizer"].numpy().tobytes(),
            int(found["vocab_size"]),
        )

    def frames(self, words: list[int]) -> list[int]:
        """The frames of a sentence."""
        made = [SILENT] * LEAD
        for place, word in enumerate(words):
            first, count = self.places[word, len(words), place].tolist()
            made += [SILENT] * (GAP if place else 0) + list(range(first, first + count))
        return made + [SILENT] * TAIL

    def said(self, words: list[int]) -> list[int]:
        """Which word is being said at every frame; a pause belongs to the next."""
        made: list[int] = []
        for place, word in enumerate(words):
            made += [word] * ((GAP if place else LEAD) + int(self.places[word, len(words), place, 1]))
        return made + [NO_WORD] * TAIL

    def sound(self, words: Sentence) -> Tensor:
        """[n] float32: what the model is to say."""
        return self.samples[self.frames([WORDS.index(word) for word in words])].flatten()


def synthesised_places(seed: int, num_words: int = len(WORDS)) -> tuple[Tensor, Tensor]:
    """(samples [F, 1920] int16, places). Every word stands at every place of a sentence of every length."""
    rng = random.Random(seed)
    frames = [np.zeros((1, FRAME_SAMPLES), np.int16)]
    places = torch.zeros(num_words, MAX_WORDS + 1, MAX_WORDS, 2, dtype=torch.int32)
    for length in range(1, MAX_WORDS + 1):
        takes: dict[tuple[int, int], Counter[bytes]] = {}
        for _ in range(TAKES if length > 1 else 1):
            orders = [rng.sample(range(num_words), num_words) for _ in range(length)]
            for words in zip(*orders, strict=True):
                for place, piece in enumerate(pieces([WORDS[word] for word in words])):
                    takes.setdefault((words[place], place), Counter())[piece] += 1
        for (word, place), found in sorted(takes.items()):
            piece = np.frombuffer(found.most_common(1)[0][0], np.int16).reshape(-1, FRAME_SAMPLES)
            places[word, length, place] = torch.tensor([sum(map(len, frames)), len(piece)])
            frames.append(piece)
    return torch.from_numpy(np.concatenate(frames)), places


def pieces(words: list[str]) -> list[bytes]:
    """What the synthesiser says of each word, int16, each a whole number of frames."""
    from tools.tiny.speech.synthesise import JOINED, VOICE, NoSynthesiser, split, synthesised

    found = split(synthesised(" ".join(words).replace(*JOINED), VOICE))
    if len(found) != len(words):
        raise NoSynthesiser(f"Got {len(found)} sounds for {len(words)} words, {words}: expected one each.")
    padded = [np.pad(piece, (0, -len(piece) % FRAME_SAMPLES)) for piece in found]
    return [np.rint(piece * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16).tobytes() for piece in padded]


def written(words: Sentence, rng: random.Random) -> str:
    """One of the ways in which these words are written."""
    figures = rng.random() < 0.25
    text = rng.choice((" ", " ", " ", ", ")).join(
        str(DIGITS.index(word)) if figures and word in DIGITS else word for word in words
    )
    text = text[0].upper() + text[1:] if rng.random() < 0.3 else text
    return text + (rng.choice(".!") if rng.random() < 0.3 else "")


def make(path: Path, seed: int, num_sentences: int) -> None:
    from tools.tiny.talker.text import encoded, trained_tokenizer

    rng = random.Random(seed)
    samples, places = synthesised_places(seed)
    said = [sentence(rng) for _ in range(num_sentences)]
    texts = [written(words, rng) for words in said]
    tokenizer = trained_tokenizer(texts)
    role, tokens = encoded(tokenizer, texts)
    numbers = [torch.tensor([WORDS.index(word) for word in words]) for words in said]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "samples": samples,
        "places": places,
        "sentences": padded(numbers, MAX_WORDS).to(torch.int8),
        "tokens": padded(tokens).to(torch.int16),
        "role": torch.tensor(role),
        "tokenizer": torch.from_numpy(np.frombuffer(tokenizer.to_str().encode(), np.uint8).copy()),
        "vocab_size": torch.tensor(tokenizer.get_vocab_size()),
    }
    save_file(content, path)
    print(f"{len(samples)} frames, {num_sentences} sentences, {path.stat().st_size / 1e6:.1f} MB")


def padded(rows: list[Tensor], length: int = 0) -> Tensor:
    length = max(length, *map(len, rows))
    found = torch.full((len(rows), length), PADDING)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--sentences", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.path, args.seed, args.sentences)


if __name__ == "__main__":
    main()
