"""Which words a recording holds, from the waveform alone: it is cut at its pauses, and each piece is compared with
every word of the world as other voices say it, by cepstra and dynamic time warping. The nearest word is the answer.

Legend: P pieces, R references, T frames of 10 ms, C cepstral features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soxr
from numpy.typing import NDArray
from scipy.fft import dct

from tools.tiny.speech.synthesise import SAMPLE_RATE, Samples, Voice, speak, split
from tools.tiny.speech.world import WORDS, Sentence

VOICES = (Voice(speed=125, pitch=40), Voice(speed=155, pitch=60), Voice(speed=140, pitch=75))  # not that of training
RATE = 16_000  # what is listened at
FRAME, HOP = 400, 160
NUM_BANDS, NUM_CEPSTRA = 32, 13
LOWEST_HZ, HIGHEST_HZ = 100.0, 6_000.0
FLOOR = 1e-3  # of the loudest band, below which nothing is told apart
SILENCE_SHARE = 0.05  # of the speech's level, below which it pauses
MIN_PIECE_S = 0.08  # shorter is a click
MIN_PAUSE_S = 0.085
FAR = 1e9

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Verdict:
    """meant: the words that were to be said. heard: what was."""

    meant: Sentence
    heard: Sentence

    @property
    def right(self) -> tuple[bool, ...]:
        """Of every word that was meant, whether it was said in its place; none is if their number is wrong."""
        if len(self.heard) != len(self.meant):
            return (False,) * len(self.meant)
        return tuple(one == other for one, other in zip(self.meant, self.heard, strict=True))

    @property
    def complaint(self) -> str | None:
        """What is wrong; None if nothing is."""
        return None if all(self.right) else f"meant {' '.join(self.meant)}, heard {' '.join(self.heard) or 'nothing'}"


def judge(words: Sentence, samples: Samples) -> Verdict:
    """samples: [n] at 24 kHz."""
    return Verdict(words, hear(samples))


def hear(samples: Samples) -> Sentence:
    """The words in a recording [n] at 24 kHz."""
    labels, references = known_words()
    return tuple(labels[int(distances(features(piece), references).argmin())] for piece in pieces(samples))


def pieces(samples: Samples) -> list[Samples]:
    """The stretches between pauses; a pause is silent beside the speech around it."""
    windows = samples[: len(samples) // 480 * 480].reshape(-1, 480)
    level = float(np.percentile(np.sqrt((windows**2).mean(axis=1)), 90)) if len(windows) else 0.0
    if level < 1e-4:
        return []
    found = split(samples, SILENCE_SHARE * level, MIN_PAUSE_S)
    return [piece for piece in found if len(piece) >= MIN_PIECE_S * SAMPLE_RATE]


@lru_cache(maxsize=1)
def known_words() -> tuple[list[str], list[Array]]:
    """(the word of every reference, its features)."""
    spoken = [(word, speak((word,), voice)) for voice in VOICES for word in WORDS]
    return [word for word, _ in spoken], [features(pieces(samples)[0]) for _, samples in spoken]


def features(piece: Samples) -> Array:
    """[n] -> [T, C]: cepstra without their mean, so without the recording's colour, and their slopes."""
    sound = np.asarray(soxr.resample(piece, SAMPLE_RATE, RATE), dtype=np.float32)
    sound = np.pad(sound, (FRAME // 2, FRAME))
    frames = np.lib.stride_tricks.sliding_window_view(sound, FRAME)[::HOP] * np.hanning(FRAME)
    bands = np.abs(np.fft.rfft(frames, 512)) ** 2 @ filters()
    logs = np.log(np.maximum(bands, FLOOR**2 * bands.max()) / bands.max())
    cepstra = dct(logs, norm="ortho")[:, :NUM_CEPSTRA]
    cepstra = cepstra - cepstra.mean(axis=0)
    cepstra[:, 0] *= 0.5  # loudness says less than colour
    padded = np.pad(cepstra, ((2, 2), (0, 0)), mode="edge")
    slopes = (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10
    return np.concatenate([cepstra, 2 * slopes], axis=1).astype(np.float32)


@lru_cache(maxsize=1)
def filters() -> Array:
    """[257, NUM_BANDS] triangles, evenly spaced in mel."""
    lowest, highest = (2595 * np.log10(1 + hz / 700) for hz in (LOWEST_HZ, HIGHEST_HZ))
    edges_mel = np.linspace(lowest, highest, NUM_BANDS + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    hertz = np.linspace(0, RATE / 2, 257)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def distances(piece: Array, references: list[Array]) -> Array:
    """[R]: the cost of the best path through frames of both, over the sum of their lengths."""
    lengths = np.array([len(one) for one in references])
    stacked = np.zeros((len(references), lengths.max(), piece.shape[1]), dtype=np.float32)
    for index, one in enumerate(references):
        stacked[index, : len(one)] = one
    products = (piece @ stacked.reshape(-1, piece.shape[1]).T).reshape(len(piece), len(references), -1)
    squares = (piece**2).sum(-1)[:, None, None] + (stacked**2).sum(-1) - 2 * products
    costs = np.sqrt(np.maximum(squares, 0))  # [T, R, S]
    sums = np.cumsum(costs, axis=2)
    best = np.full((len(references), lengths.max() + 1), FAR, dtype=np.float32)
    best[:, 0] = 0
    for row, passed in zip(costs, sums, strict=True):
        # A place is entered from the row before (a diagonal step counts as two), or from its left neighbour.
        entered = np.minimum(best[:, :-1] + row, best[:, 1:]) + row
        best[:, 1:] = np.minimum.accumulate(entered - passed, axis=1) + passed
        best[:, 0] = FAR
    return best[np.arange(len(references)), lengths] / (lengths + len(piece))
