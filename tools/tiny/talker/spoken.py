"""What is trained on: every word as it is said at every place of a sentence, on the grid of frames, and the text tokens
of its spellings; any sentence can be put together of these. One safetensors file holds it, so that training needs
neither synthesiser nor tokenizer.

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

from tools.tiny.speech.world import MAX_WORDS, WORDS, Sentence
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
    spellings: Tensor  # [words, 3, 2, n] text tokens of a word: at the beginning, behind another word, with a capital;
    # each in letters and, if it has one, as a figure; PADDING behind
    comma: Tensor  # []
    stops: Tensor  # what may end a sentence
    role: Tensor  # [3]: what a turn begins with
    tokenizer: bytes  # tokenizer.json
    vocab_size: int

    @classmethod
    def load(cls, path: Path) -> Spoken:
        found = load_file(path)
        return cls(
            found["samples"].float() / 2**15,
            found["places"].long(),
            found["spellings"].long(),
            found["comma"].long(),
            found["stops"].long(),
            found["role"].long(),
            found["tokenizer"].numpy().tobytes(),
            int(found["vocab_size"]),
        )

    @property
    def known(self) -> Tensor:
        """Numbers of the words that were recorded."""
        return self.places[:, 1, 0, 1].nonzero()[:, 0]

    def frames(self, words: list[int]) -> list[int]:
        """The frames of a sentence."""
        made = [SILENT] * LEAD
        for place, word in enumerate(words):
            first, count = self.places[word, len(words), place].tolist()
            made += [SILENT] * (GAP if place else 0) + list(range(first, first + count))
        return made + [SILENT] * TAIL

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


def make(path: Path, seed: int) -> None:
    from tools.tiny.talker.text import encoded, words_tokenizer

    samples, places = synthesised_places(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"samples": samples, "places": places, **encoded(words_tokenizer())}, path)
    print(f"{len(samples)} frames, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.path, args.seed)


if __name__ == "__main__":
    main()
