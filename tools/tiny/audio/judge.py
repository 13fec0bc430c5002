"""Whether a recording is a sound: the detector's findings against what is meant."""

from __future__ import annotations

from dataclasses import dataclass

from tools.tiny.audio.detect import Note, Samples, hear
from tools.tiny.audio.world import Sound


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is right of a recording. notes_right: every note once, in order or together, and nothing else. heard: in
    words, for a person.
    """

    notes_right: bool
    timbre_right: bool
    loudness_right: bool
    speed_right: bool
    heard: str

    @property
    def is_right(self) -> bool:
        return self.notes_right and self.timbre_right and self.loudness_right and self.speed_right

    @property
    def complaint(self) -> str | None:
        """What is wrong, and what was heard; None if nothing is."""
        rights = {
            "notes": self.notes_right,
            "timbre": self.timbre_right,
            "loudness": self.loudness_right,
            "speed": self.speed_right,
        }
        wrong = [name for name, is_right in rights.items() if not is_right]
        return f"{', '.join(wrong)} wrong: heard {self.heard}" if wrong else None


def judge(sound: Sound, samples: Samples) -> Verdict:
    """samples: [n] at 16 kHz. What the words leave open is loud and slow."""
    heard = hear(samples)
    expected = [sound.notes] if sound.is_chord else [(name,) for name in sound.notes]
    return Verdict(
        notes_right=[note.names for note in heard] == expected,
        timbre_right=bool(heard) and all(note.timbre == sound.timbre for note in heard),
        loudness_right=bool(heard) and all(note.is_loud != sound.is_soft for note in heard),
        speed_right=bool(heard) and all(note.length_s == sound.note_s for note in heard),
        heard=" then ".join(map(in_words, heard)) or "silence",
    )


def in_words(note: Note) -> str:
    return f"{'+'.join(note.names) or 'noise'} ({note.timbre}, peak {note.peak:.2f}, {note.length_s:.2f} s)"
