"""Speaks words with espeak-ng: float32 samples at 24 kHz, the same samples for the same words, always.

Every word begins on the grid of codes (20 ms) and the pauses are whole codes of exact silence, so a sentence is a whole
number of codes. espeak-ng is a program that only these tools need.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soxr
from numpy.typing import NDArray

SAMPLE_RATE = 24_000
CODE_SAMPLES = 480  # 20 ms
ESPEAK_RATE, ESPEAK_HEADER_BYTES, ESPEAK_GAP = 22_050, 44, 12
LEAD_CODES, TAIL_CODES = 4, 8  # silence before the first word and after the last
WINDOW = 120  # samples whose energy is looked at together
SILENCE = 0.003  # root mean square below which a window is silent
JOINED = ("no one", "no, one")  # espeak-ng says the first in one breath
MIN_PAUSE_S = 0.1  # silence inside a word (before p, t, k) is shorter, that between words longer

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Voice:
    """speed: words a minute; pitch: 0 to 99; gap: codes (20 ms) between words; variant: espeak-ng's name of a voice."""

    speed: int = 140
    pitch: int = 50
    gap: int = 7
    variant: str = "en-us"


VOICE = Voice()


class NoSynthesiser(RuntimeError):
    """espeak-ng is not installed, or does not speak as it should."""


def has_synthesiser() -> bool:
    return shutil.which("espeak-ng") is not None


def speak(words: Sequence[str], voice: Voice = VOICE) -> Samples:
    """[n * 480] samples in which the words follow each other after short pauses."""
    pieces = [on_grid(piece) for piece in split(synthesised(" ".join(words).replace(*JOINED), voice))]
    if len(pieces) != len(words):
        raise NoSynthesiser(f"Got {len(pieces)} sounds for {len(words)} words, {' '.join(words)!r}: expected one each.")
    parts = [silence(LEAD_CODES)]
    for index, piece in enumerate(pieces):
        parts += [silence(voice.gap), piece] if index else [piece]
    return np.concatenate([*parts, silence(TAIL_CODES)])


@lru_cache(maxsize=512)
def synthesised(text: str, voice: Voice) -> Samples:
    """What espeak-ng says, at 24 kHz."""
    if not has_synthesiser():
        raise NoSynthesiser("Got no espeak-ng on the path, and speech is made with it: install the package espeak-ng.")
    command = ["espeak-ng", "-v", voice.variant, "-s", str(voice.speed), "-p", str(voice.pitch)]
    said = subprocess.run([*command, "-g", str(ESPEAK_GAP), "--stdout", text], capture_output=True, check=True).stdout
    samples = np.frombuffer(said[ESPEAK_HEADER_BYTES:], dtype=np.int16).astype(np.float32) / 2**15
    return np.asarray(soxr.resample(samples, ESPEAK_RATE, SAMPLE_RATE), dtype=np.float32)


def split(samples: Samples, silence_level: float = SILENCE, min_pause_s: float = MIN_PAUSE_S) -> list[Samples]:
    """The stretches of sound between pauses, each with a window of what is around it."""
    windows = samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW)
    loud = np.flatnonzero(np.sqrt((windows**2).mean(axis=1)) >= silence_level)
    if len(loud) == 0:
        return []
    breaks = np.flatnonzero(np.diff(loud) * WINDOW > min_pause_s * SAMPLE_RATE)
    starts, ends = loud[np.concatenate([[0], breaks + 1])], loud[np.concatenate([breaks, [len(loud) - 1]])]
    pairs = zip(starts, ends, strict=True)
    return [samples[max(0, start - 1) * WINDOW : (end + 2) * WINDOW] for start, end in pairs]


def on_grid(samples: Samples) -> Samples:
    """Silence after, up to a whole number of codes."""
    return np.pad(samples, (0, -len(samples) % CODE_SAMPLES))


def silence(codes: int) -> Samples:
    return np.zeros(codes * CODE_SAMPLES, dtype=np.float32)
