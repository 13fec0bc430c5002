"""The world of the tiny sound model: one to four notes in a row or one chord, and the canonical words for them.

A sound is what is meant; `tools.tiny.audio.render` plays it, `tools.tiny.audio.words` says it in near variants,
`tools.tiny.audio.loose` in loose requests, and `tools.tiny.audio.detect` judges a recording of it. Sounds for which
`is_held_out` is true never occur in training.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
OCTAVES = (3, 4, 5)
NOTES = tuple(f"{name}{octave}" for octave in OCTAVES for name in PITCH_CLASSES)
TIMBRES = ("sine", "square", "saw", "plucked")
LOUDNESSES = ("loud", "soft")
SPEEDS = ("slow", "fast")
NOTE_S = {"slow": 0.5, "fast": 0.25}
MAX_NOTES = 4
MAX_CHORD = 3
MIN_INTERVAL, MAX_SPAN = 3, 11  # semitones between a chord's neighbours, and from its lowest to its highest
DURATION_S = 2.0
HELD_OUT_SHARE = 10  # one in so many

TIMBRE_WORDS = {"sine": "sine", "square": "square", "saw": "saw", "plucked": "plucked string"}


@dataclass(frozen=True, slots=True)
class Sound:
    """notes: in the order in which they sound, or a chord's from low to high. What the words leave open is None: loud,
    slow.
    """

    notes: tuple[str, ...]
    timbre: str
    is_chord: bool = False
    loudness: str | None = None
    speed: str | None = None

    @property
    def note_s(self) -> float:
        """Seconds of a note, or of the chord."""
        return NOTE_S[self.speed or "slow"]

    @property
    def sounding_s(self) -> float:
        """Seconds until the last note ends."""
        return self.note_s * (1 if self.is_chord else len(self.notes))

    @property
    def is_soft(self) -> bool:
        return self.loudness == "soft"


def frequency(note: str) -> float:
    """Hertz, equal temperament, A4 = 440."""
    name, octave = note[:-1], int(note[-1])
    return float(440.0 * 2 ** ((PITCH_CLASSES.index(name) - 9) / 12 + octave - 4))


def canonical(sound: Sound) -> str:
    """The one wording that every request is rewritten into: 'C4 then E4, square, fast', 'chord of A3 and E4, sine,
    soft'.
    """
    if sound.is_chord:
        head = "chord of " + ", ".join(sound.notes[:-1]) + f" and {sound.notes[-1]}"
    else:
        head = " then ".join(sound.notes)
    tail = [TIMBRE_WORDS[sound.timbre], sound.loudness, sound.speed]
    return ", ".join([head, *(word for word in tail if word)])


def is_held_out(sound: Sound) -> bool:
    """Whether this combination of notes, timbre, loudness and speed is kept for judging, however it is worded."""
    meant = (sound.notes, sound.timbre, sound.is_chord, sound.is_soft, sound.speed == "fast")
    return int(hashlib.sha256(repr(meant).encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def sample_chord(rng: random.Random, count: int) -> tuple[str, ...]:
    """Notes from low to high, a minor third or more apart and within one octave."""
    while True:
        places = sorted(rng.sample(range(len(NOTES)), count))
        gaps = [high - low for low, high in zip(places, places[1:], strict=False)]
        if min(gaps) >= MIN_INTERVAL and sum(gaps) <= MAX_SPAN:
            return tuple(NOTES[place] for place in places)


def sample_sound(rng: random.Random, *, held_out: bool = False) -> Sound:
    """A random sound, one that is kept for judging or one that is not. Notes of a row may repeat, a chord's do not."""
    while True:
        is_chord = rng.random() < 0.3
        if is_chord:
            count = rng.choice(range(2, MAX_CHORD + 1))
            notes = sample_chord(rng, count)
        else:
            count = rng.choices((1, 2, 3, 4), (0.25, 0.25, 0.25, 0.25))[0]
            notes = tuple(rng.choice(NOTES) for _ in range(count))
        sound = Sound(
            notes,
            rng.choice(TIMBRES),
            is_chord,
            rng.choice((None, "loud", "soft", "soft")),
            rng.choice((None, "slow", "fast", "fast")),
        )
        if is_held_out(sound) == held_out:
            return sound
