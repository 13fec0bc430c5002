"""Recordings of training sentences and of held-out ones, with their log-mel spectrograms, and random pieces of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.tiny.speech.mel import HOP, log_mel
from tools.tiny.speech.synthesise import speak
from tools.tiny.speech.world import Sentence, sentence


@dataclass(frozen=True, slots=True)
class Recording:
    """samples: float32 [n] at 24 kHz. mel: float32 [n / 240, 80]."""

    words: Sentence
    samples: Tensor
    mel: Tensor


def recordings(count: int, seed: int, *, held_out: bool = False) -> list[Recording]:
    """Of random sentences, the same for the same seed."""
    rng = random.Random(f"recordings {held_out} {seed}")
    found: list[Recording] = []
    while len(found) < count:
        words = sentence(rng, held_out=held_out)
        if ("no", "one") not in zip(words, words[1:], strict=False):
            found.append(recording(words))
    return found


def recording(words: Sentence) -> Recording:
    samples = torch.from_numpy(speak(words))
    return Recording(words, samples, log_mel(samples))


class Pieces:
    """Random pieces of recordings, a whole number of frames each; mostly silent ones are drawn again."""

    def __init__(self, data: list[Recording], num_frames: int, seed: int) -> None:
        self.data, self.num_frames = data, num_frames
        self.weights = torch.tensor([float(len(one.mel)) for one in data])
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """(mel [size, num_frames, 80], samples [size, num_frames * 240])."""
        pairs = [self._piece() for _ in range(size)]
        mels, samples = zip(*pairs, strict=True)
        return torch.stack(mels), torch.stack(samples)

    def _piece(self) -> tuple[Tensor, Tensor]:
        while True:
            chosen = self.data[int(torch.multinomial(self.weights, 1, generator=self.generator))]
            last_start = len(chosen.mel) - self.num_frames
            if last_start < 0:
                continue
            start = int(torch.randint(last_start + 1, (), generator=self.generator))
            mel = chosen.mel[start : start + self.num_frames]
            is_loud = mel.amax(dim=1) > -2
            if is_loud.float().mean() > float(torch.rand((), generator=self.generator)):
                return mel, chosen.samples[start * HOP : (start + self.num_frames) * HOP]
