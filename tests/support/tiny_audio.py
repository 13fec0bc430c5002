"""Waveforms for judging the detector of sounds, made in other ways than `tools.tiny.audio.render` makes its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from tools.tiny.audio.world import Sound, frequency

SAMPLE_RATE = 16_000
OVERSAMPLED = 8
SMOOTHING = 0.02


def synthesised(sound: Sound, noise: float = 0.003, seed: int = 0) -> NDArray[np.float64]:
    """[32000]: geometric waves, oversampled and decimated, and a string by Karplus and Strong, with white noise."""
    rng = np.random.default_rng(seed)
    level = 0.2 if sound.is_soft else 0.8
    samples = noise * rng.standard_normal(2 * SAMPLE_RATE)
    for index, name in enumerate(sound.notes):
        start = 0 if sound.is_chord else round(index * sound.note_s * SAMPLE_RATE)
        wave = string(frequency(name), sound.note_s) if sound.timbre == "plucked" else geometric(name, sound, rng)
        wave = wave * fade(len(wave)) * level / (len(sound.notes) if sound.is_chord else 1)
        samples[start : start + len(wave)] += wave
    return samples


def geometric(name: str, sound: Sound, rng: np.random.Generator) -> NDArray[np.float64]:
    """One note from a phase of its own, peak about 1."""
    count = round(sound.note_s * SAMPLE_RATE)
    phase = 2 * np.pi * (frequency(name) * np.arange(count * OVERSAMPLED) / (SAMPLE_RATE * OVERSAMPLED) + rng.random())
    shape = {"sine": np.sin, "square": signal.square, "saw": signal.sawtooth}[sound.timbre]
    return np.asarray(signal.decimate(shape(phase), OVERSAMPLED, ftype="fir"))


def string(hertz: float, seconds: float) -> NDArray[np.float64]:
    """A delay line of one period that begins as a string plucked at a fifth of its length and is smoothed a little
    every time round; an all-pass filter tunes it between whole samples.
    """
    period = SAMPLE_RATE / hertz - SMOOTHING
    whole = int(period)
    rest = period - whole
    tuning = (1 - rest) / (1 + rest)
    place = np.arange(whole) / whole
    shape = np.interp(place, [0.0, 0.1, 0.2, 0.8, 0.9, 1.0], [0.0, 0.8, 1.0, -1.0, -0.8, 0.0])
    excitation = np.concatenate([shape, np.zeros(round(seconds * SAMPLE_RATE) - whole)])
    loss = np.exp(-6 / hertz)
    # y[n] = x[n] + loss * allpass(smoothed)(y[n - whole]), as one recursive filter.
    loop = loss * np.convolve([1 - SMOOTHING, SMOOTHING], [tuning, 1.0])
    denominator = np.zeros(whole + 3)
    denominator[:2] = [1.0, tuning]
    denominator[whole : whole + 3] -= loop
    samples = signal.lfilter([1.0, tuning], denominator, excitation)
    return np.asarray(samples / np.abs(samples).max())


def fade(count: int) -> NDArray[np.float64]:
    """Without clicks: 4 ms up, 20 ms down."""
    place = np.arange(count) / SAMPLE_RATE
    return np.asarray(np.minimum(np.clip(place / 0.004, 0, 1), np.clip((place[-1] - place) / 0.02, 0, 1)))
