"""Listens to a recording: which notes, one after the other or together, in which timbre, how loud and how long. Shares
nothing with the code that plays.

Time is cut into quarter seconds, and neighbours are joined where the same notes go on. Peaks of the spectrum are notes,
from low to high, unless they are overtones of notes below: no stronger than an overtone may be. The timbre is told from
the overtones' strengths and from how the level falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import windows

Samples = NDArray[np.floating]

SAMPLE_RATE = 16_000
CELL = SAMPLE_RATE // 4
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
MARGIN = 160  # samples at both ends of a cell that are not part of its spectrum: attack, release, gap
FFT_SIZE = 32_768
HZ_PER_BIN = SAMPLE_RATE / FFT_SIZE
LOWEST_HZ, HIGHEST_HZ, HIGHEST_OVERTONE_HZ = 90.0, 1_400.0, 4_500.0
QUIETEST, QUIET_SHARE = 0.003, 0.05  # a cell's highest peak, absolute and of all cells', below which it is silent
MOST_TOGETHER = 5  # more peaks than that are noise
PEAK_SHARE = 0.22  # of the highest peak, below which a peak is no note
SAME_HZ = 12.0  # partials nearer than that cannot be told apart in a cell
OVERTONES = {  # amplitude of overtones 2 to 5 over the fundamental's
    "sine": (0.0, 0.0, 0.0, 0.0),
    "square": (0.0, 1 / 3, 0.0, 1 / 5),
    "saw": (1 / 2, 1 / 3, 1 / 4, 1 / 5),
}
MOST_OVERTONE = 0.8  # over the fundamental's amplitude, above which an overtone is a note of its own
MOST_SUSTAINED_FALL = 0.6  # end level over start level of a note that is not plucked
PLUCK = 960  # samples at the start of a plucked note in which its overtones are still heard
LEAST_PLUCKED_OVERTONE = 0.06
LEAST_LOUD = 0.4  # half way, as ratios go, between the peaks of a soft note (0.2) and a loud one (0.8)
DIP = 0.5  # level between two notes over the level beside


@dataclass(frozen=True, slots=True)
class Note:
    """Notes that sound together, from low to high ('A#4'), from one onset to the next. timbre: 'sine', 'square', 'saw',
    'plucked', or 'unknown'.
    """

    names: tuple[str, ...]
    start_s: float
    length_s: float
    timbre: str
    peak: float

    @property
    def is_loud(self) -> bool:
        return self.peak > LEAST_LOUD


@dataclass(frozen=True, slots=True)
class Partials:
    """The spectrum of a stretch of sound. amplitudes: [FFT_SIZE / 2 + 1], a sinusoid's own amplitude at its peak."""

    amplitudes: Samples

    @classmethod
    def of(cls, samples: Samples) -> Partials:
        window = windows.hann(len(samples), sym=False)
        return cls(np.abs(np.fft.rfft(samples * window, FFT_SIZE)) * 2 / window.sum())

    @property
    def highest(self) -> float:
        """The amplitude of the strongest partial that may be a note."""
        return float(self.amplitudes[round(LOWEST_HZ / HZ_PER_BIN) : round(HIGHEST_HZ / HZ_PER_BIN)].max())

    def at(self, hertz: float, within_hz: float = 6.0) -> float:
        """The amplitude at a frequency, or at its surroundings' highest point."""
        low, high = (round(f / HZ_PER_BIN) for f in (hertz - within_hz, hertz + within_hz))
        return float(self.amplitudes[low : high + 1].max(initial=0.0))

    def peaks(self) -> list[tuple[float, float]]:
        """(hertz, amplitude) of the local maxima that may be notes, from low to high."""
        low, high = (round(f / HZ_PER_BIN) for f in (LOWEST_HZ, HIGHEST_HZ))
        middle = self.amplitudes[low:high]
        is_peak = (middle > self.amplitudes[low - 1 : high - 1]) & (middle >= self.amplitudes[low + 1 : high + 1])
        is_peak &= middle > PEAK_SHARE * middle.max()
        return [((low + int(i)) * HZ_PER_BIN, float(middle[i])) for i in np.flatnonzero(is_peak)]


def hear(samples: Samples) -> list[Note]:
    """samples: [n] at 16 kHz -> what sounds, in order."""
    cells = [samples[start : start + CELL] for start in range(0, len(samples) - CELL // 2, CELL)]
    spectra = [Partials.of(cell[MARGIN : len(cell) - 3 * MARGIN]) for cell in cells]
    quietest = max(QUIETEST, QUIET_SHARE * max((partials.highest for partials in spectra), default=0.0))
    heard: list[tuple[int, int, tuple[float, ...]]] = []  # first cell, end cell, fundamentals
    for index, partials in enumerate(spectra):
        if partials.highest < quietest:
            continue
        pitches = fundamentals(partials)
        if heard and heard[-1][1] == index and goes_on(samples, index * CELL, heard[-1][2], pitches):
            heard[-1] = (heard[-1][0], index + 1, heard[-1][2])
        else:
            heard.append((index, index + 1, pitches))
    return [note(samples[first * CELL : end * CELL], first, pitches) for first, end, pitches in heard]


def note(samples: Samples, first_cell: int, pitches: tuple[float, ...]) -> Note:
    """samples: from the note's onset to the next."""
    return Note(
        tuple(map(name_of, pitches)),
        first_cell * CELL / SAMPLE_RATE,
        round(len(samples) / CELL) * CELL / SAMPLE_RATE,
        timbre_of(samples, pitches),
        float(np.abs(samples).max()),
    )


def name_of(hertz: float) -> str:
    """The nearest note, A4 = 440 Hz."""
    number = round(69 + 12 * float(np.log2(hertz / 440)))
    return f"{NAMES[number % 12]}{number // 12 - 1}"


def fundamentals(partials: Partials) -> tuple[float, ...]:
    """Hertz of every note, from low to high; none in noise."""
    found: list[tuple[float, float]] = []
    for hertz, amplitude in partials.peaks():
        explained = [
            heard_amplitude
            for heard_hertz, heard_amplitude in found
            if round(hertz / heard_hertz) >= 2 and abs(hertz - round(hertz / heard_hertz) * heard_hertz) < SAME_HZ
        ]
        if amplitude > MOST_OVERTONE * sum(explained):
            found.append((hertz, amplitude))
    return tuple(hertz for hertz, _ in found) if len(found) <= MOST_TOGETHER else ()


def goes_on(samples: Samples, boundary: int, before: tuple[float, ...], after: tuple[float, ...]) -> bool:
    """Whether the same notes sound on both sides without a new onset. A chord's level beats, so that dips say nothing;
    in this world a chord is never struck twice.
    """
    if tuple(map(name_of, before)) != tuple(map(name_of, after)):
        return False
    return len(before) > 1 or not has_onset(samples, boundary)


def has_onset(samples: Samples, boundary: int) -> bool:
    """Whether the level dips or leaps at `boundary`."""
    smooth = np.sqrt(np.convolve(np.square(samples, dtype=np.float64), np.ones(128) / 128, mode="same"))
    before = float(np.median(smooth[boundary - 1120 : boundary - 560]))
    after = float(np.median(smooth[boundary + 320 : boundary + 960]))
    lowest = float(smooth[boundary - 480 : boundary + 160].min())
    return lowest < DIP * min(before, after) or after > 1.5 * before


def timbre_of(samples: Samples, pitches: tuple[float, ...]) -> str:
    """From the start of a note, where all its overtones still sound, and from its end."""
    if not pitches:
        return "unknown"
    if falls(samples):
        pluck = Partials.of(samples[MARGIN // 2 : MARGIN // 2 + PLUCK])
        return "plucked" if overtone_ratios(pluck, pitches)[0] > LEAST_PLUCKED_OVERTONE else "unknown"
    ratios = overtone_ratios(Partials.of(samples[MARGIN : CELL - 3 * MARGIN]), pitches)
    known = ~np.isnan(ratios)
    roots = np.sqrt(ratios)  # so that a weak overtone counts: the ear hears levels
    distances = {name: float(np.abs(roots - np.sqrt(shape))[known].mean()) for name, shape in OVERTONES.items()}
    return min(distances, key=lambda name: distances[name])


def overtone_ratios(partials: Partials, pitches: tuple[float, ...]) -> Samples:
    """[4] amplitudes of overtones 2 to 5 over the fundamental's, averaged over the notes; NaN where none can be told
    apart from another note's or is too high.
    """
    every = [(hertz, k) for hertz in pitches for k in range(1, 12)]
    ratios = np.full((len(pitches), 4), np.nan)
    for row, hertz in enumerate(pitches):
        for k in range(2, 6):
            is_alone = all(abs(k * hertz - other * j) > SAME_HZ for other, j in every if other != hertz)
            if is_alone and k * hertz < HIGHEST_OVERTONE_HZ:
                ratios[row, k - 2] = partials.at(k * hertz) / partials.at(hertz)
    counts = (~np.isnan(ratios)).sum(0)
    return np.where(counts > 0, np.nansum(ratios, 0) / np.maximum(counts, 1), np.nan)


def falls(samples: Samples) -> bool:
    """Whether the level falls from the start of a note to its end."""
    part = (len(samples) - 4 * MARGIN) // 3
    start, end = samples[MARGIN : MARGIN + part], samples[len(samples) - 3 * MARGIN - part : len(samples) - 3 * MARGIN]
    return bool(np.sqrt(np.square(end).mean()) < MOST_SUSTAINED_FALL * np.sqrt(np.square(start).mean()))
