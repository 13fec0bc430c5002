"""The codes of speech: 20 ms, two frames of a log-mel spectrogram, become the nearest of some hundred kinds (k-means).

What tells words apart, the rough shape of a spectrum, counts fully; its fine structure, mostly pitch, a little: the
fewer ways a word has to be written, the easier the codes are to foretell. Code 0 is silence.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tiny.speech.mel import FLOOR, NUM_BANDS

NUM_CODES = 512
FRAMES = 2  # of a code
ROUGH, FINE_WEIGHT = 20, 0.2  # how many coefficients of a spectrum's cosine transform count fully; the others' weight
SILENCE = FLOOR + 0.5  # no band of a silent frame reaches higher
ROUNDS = 25


@dataclass(frozen=True, slots=True)
class Codebook:
    """centres: float32 [codes, 160], see `features`. mel: float32 [codes, 2, 80], the mean of what each code means."""

    centres: Tensor
    mel: Tensor

    @classmethod
    def fit(cls, mels: list[Tensor], num_codes: int = NUM_CODES, seed: int = 0) -> Codebook:
        """From spectrograms [T, 80], by k-means over the pairs of their frames that are not silent."""
        pairs = torch.cat([paired(mel) for mel in mels])
        pairs = pairs[~is_silent(pairs)]
        if len(pairs) < num_codes:
            raise ValueError(f"mels: got {len(pairs)} pairs of frames with sound, expected at least {num_codes}")
        generator = torch.Generator().manual_seed(seed)
        points = features(pairs)
        centres = k_means(points, num_codes - 1, generator)
        members = torch.cdist(points, centres).argmin(dim=1)
        means = mean_of(pairs, members, num_codes - 1)
        silent = torch.full((1, FRAMES, NUM_BANDS), FLOOR)
        return cls(torch.cat([features(silent), centres]), torch.cat([silent, means]))

    @property
    def num_codes(self) -> int:
        return len(self.centres)

    def encode(self, mel: Tensor) -> Tensor:
        """float32 [T, 80] -> int64 [ceil(T / 2)]."""
        pairs = paired(mel)
        return torch.cdist(features(pairs), self.centres).argmin(dim=1).masked_fill(is_silent(pairs), 0)

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [n] -> the means, float32 [2 n, 80]: steps where speech glides."""
        return self.mel[codes].flatten(0, 1)

    def save(self, path: Path) -> None:
        save_file({"centres": self.centres, "mel": self.mel}, path)

    @classmethod
    def load(cls, path: Path) -> Codebook:
        return cls(**load_file(path))


def paired(mel: Tensor) -> Tensor:
    """[T, 80] -> [ceil(T / 2), 2, 80], an odd last frame with silence."""
    return F.pad(mel, (0, 0, 0, len(mel) % FRAMES), value=FLOOR).unflatten(0, (-1, FRAMES))


def is_silent(pairs: Tensor) -> Tensor:
    """[n, 2, 80] -> bool [n]."""
    return pairs.amax(dim=(1, 2)) < SILENCE


def features(pairs: Tensor) -> Tensor:
    """[n, 2, 80] -> [n, 160]: orthonormal cosine transform of every frame, the fine coefficients weighted down."""
    weights = torch.where(torch.arange(NUM_BANDS) < ROUGH, 1.0, FINE_WEIGHT)
    return (pairs @ cosines().T * weights).flatten(1)


@functools.cache
def cosines() -> Tensor:
    """[80, 80], a wave a row."""
    index = torch.arange(NUM_BANDS)
    waves = torch.cos(math.pi * (index + 0.5) * index[:, None] / NUM_BANDS) * (2 / NUM_BANDS) ** 0.5
    waves[0] *= 0.5**0.5
    return waves


def k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[n, d] -> [count, d]. A centre that loses all its points moves to a random one."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(ROUNDS):
        members = torch.cdist(points, centres).argmin(dim=1)
        spare = points[torch.randint(len(points), (count,), generator=generator)]
        is_used = torch.bincount(members, minlength=count) > 0
        centres = torch.where(is_used[:, None], mean_of(points, members, count), spare)
    return centres


def mean_of(values: Tensor, members: Tensor, count: int) -> Tensor:
    """values [n, ...], members [n] -> [count, ...], the mean over the values of each member; 0 where there are none."""
    total = values.new_zeros(count, *values.shape[1:]).index_add_(0, members, values)
    num_values = torch.bincount(members, minlength=count).clamp(min=1)
    return total / num_values.view(-1, *[1] * (values.dim() - 1))
