"""Plays a sound of the world: float32 samples at 16 kHz.

Every note begins at phase zero on a quarter-second grid, so the same words always mean the same samples. Timbres are
sums of harmonics below `HIGHEST_HZ`, so nothing aliases.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tools.tiny.audio.world import DURATION_S, Sound, frequency

SAMPLE_RATE = 16_000
HIGHEST_HZ = 5_000.0
PEAK = {False: 0.8, True: 0.2}  # by is_soft
ATTACK_S, RELEASE_S, GAP_S = 0.005, 0.015, 0.01
PLUCK_PLACE = 0.2  # of the string's length
PLUCK_DECAY, PLUCK_DECAY_PER_HARMONIC = 5.0, 1.0  # 1/s

Samples = NDArray[np.float32]


def render(sound: Sound, duration_s: float = DURATION_S) -> Samples:
    """[duration_s * 16000] samples, silence after the last note."""
    samples = np.zeros(round(duration_s * SAMPLE_RATE), dtype=np.float32)
    gain = PEAK[sound.is_soft]
    if sound.is_chord:
        parts = [(0.0, note, gain / len(sound.notes)) for note in sound.notes]
    else:
        parts = [(index * sound.note_s, note, gain) for index, note in enumerate(sound.notes)]
    for start_s, note, level in parts:
        start = round(start_s * SAMPLE_RATE)
        played = level * tone(note, sound.timbre, sound.note_s)[: max(0, len(samples) - start)]
        samples[start : start + len(played)] += played
    return samples


@lru_cache(maxsize=512)
def tone(note: str, timbre: str, seconds: float) -> Samples:
    """[seconds * 16000] samples of one note with peak 1."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    base = frequency(note)
    harmonics = range(1, max(1, int(HIGHEST_HZ / base)) + 1)
    wave = sum(amplitude(k, timbre) * damping(k, timbre, time) * np.sin(2 * np.pi * base * k * time) for k in harmonics)
    enveloped = np.asarray(wave) * envelope(time, seconds)
    return (enveloped / np.abs(enveloped).max()).astype(np.float32)


def amplitude(harmonic: int, timbre: str) -> float:
    """Of a harmonic (1 is the fundamental), up to a common factor."""
    if timbre == "sine":
        return float(harmonic == 1)
    if timbre == "square":
        return harmonic % 2 / harmonic
    if timbre == "saw":
        return 1 / harmonic
    return abs(float(np.sin(np.pi * PLUCK_PLACE * harmonic))) / harmonic**1.5 + 0.02 / harmonic


def damping(harmonic: int, timbre: str, time: NDArray[np.float64]) -> NDArray[np.float64] | float:
    """How a harmonic fades: only a plucked string does, its high harmonics first."""
    return np.exp(-time * (PLUCK_DECAY + PLUCK_DECAY_PER_HARMONIC * harmonic)) if timbre == "plucked" else 1.0


def envelope(time: NDArray[np.float64], seconds: float) -> NDArray[np.float64]:
    """Rises at once, ends a little before the next note, so that a repeated note is heard twice."""
    rise = np.clip(time / ATTACK_S, 0, 1)
    fall = np.clip((seconds - GAP_S - time) / RELEASE_S, 0, 1)
    return np.minimum(rise, fall)
