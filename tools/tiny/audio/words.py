"""Says a sound in near variants of its canonical words, as a person types them who knows what the model plays.

The same grammar, with wider words, says it loosely (`tools.tiny.audio.loose`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from tools.tiny.audio.world import Sound, canonical
from tools.tiny.image.loose import is_held_out

__all__ = ["Vocabulary", "is_held_out", "phrase", "wording"]

CANONICAL_SHARE = 0.3
FLATS = {"C#": "Db", "D#": "Eb", "F#": "Gb", "G#": "Ab", "A#": "Bb"}
DEFAULT_TIMBRE, DEFAULT_OCTAVE = "sine", "4"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words for what is not a note. `adjectives` stand before a note or a chord, `remarks` after it and a comma or
    before it and a colon, `adverbs` right behind it. The shares: of phrases with a colon, and of phrases in the fourth
    octave that do not say so.
    """

    adjectives: Mapping[str, tuple[str, ...]]
    remarks: Mapping[str, tuple[str, ...]]
    adverbs: Mapping[str, tuple[str, ...]]
    colon_share: float
    open_octave_share: float


NEAR = Vocabulary(
    adjectives={
        "loud": ("loud",),
        "soft": ("soft", "quiet"),
        "slow": ("slow",),
        "fast": ("fast", "quick"),
        "sine": ("sine",),
        "square": ("square wave",),
        "saw": ("saw", "sawtooth"),
        "plucked": ("plucked",),
    },
    remarks={
        "loud": ("loud",),
        "soft": ("soft", "quiet"),
        "slow": ("slow",),
        "fast": ("fast", "quick"),
        "sine": ("sine", "sine wave", "sine tone"),
        "square": ("square", "square wave"),
        "saw": ("saw", "saw wave", "sawtooth", "sawtooth wave"),
        "plucked": ("plucked string", "plucked", "string"),
    },
    adverbs={
        "loud": ("loudly",),
        "soft": ("softly", "quietly"),
        "slow": ("slowly",),
        "fast": ("fast", "quickly"),
        "sine": ("as a sine wave", "with a sine wave"),
        "square": ("as a square wave", "with a square wave", "on a square wave"),
        "saw": ("as a saw wave", "with a saw wave", "as a sawtooth wave", "on a sawtooth wave"),
        "plucked": ("on a plucked string", "on a string", "plucked on a string"),
    },
    colon_share=0.25,
    open_octave_share=0.1,
)


def wording(sound: Sound, rng: random.Random) -> str:
    """Words that mean `sound` to the sound model: canonical ones in three cases of ten."""
    return canonical(sound) if rng.random() < CANONICAL_SHARE else phrase(sound, rng, NEAR)


def phrase(sound: Sound, rng: random.Random, vocabulary: Vocabulary) -> str:
    """Notes, timbre, loudness and speed in any order. No word for a timbre means sine, and no octave the fourth."""
    qualities = [quality for quality in (sound.loudness, sound.speed) if quality]
    if sound.timbre != DEFAULT_TIMBRE or rng.random() < 0.8:
        qualities.append(sound.timbre)
    rng.shuffle(qualities)
    names = spelled(sound.notes, rng, vocabulary.open_octave_share)
    if rng.random() < vocabulary.colon_share and qualities:
        return with_colon(sound, names, qualities, rng, vocabulary)
    adjectives = [quality for quality in qualities if rng.random() < 0.35]
    behind = [quality for quality in qualities if quality not in adjectives]
    front = rng.choice((" ", ", ")).join(rng.choice(vocabulary.adjectives[quality]) for quality in adjectives)
    return head(sound, names, front, rng) + tail(behind, rng, vocabulary)


def with_colon(sound: Sound, names: list[str], qualities: list[str], rng: random.Random, words: Vocabulary) -> str:
    """'soft and fast: C4, E4, sine'."""
    cut = rng.randint(1, len(qualities))
    first = [rng.choice(words.remarks[quality]) for quality in qualities[:cut]]
    joined = rng.choice((" and ", ", ", " ")).join(first)
    rest = "".join(f", {rng.choice(words.remarks[quality])}" for quality in qualities[cut:])
    return f"{joined}: {head(sound, names, '', rng)}{rest}"


def tail(qualities: list[str], rng: random.Random, vocabulary: Vocabulary) -> str:
    """What stands behind the notes: adverbs first, since remarks end at a comma."""
    adverbs = [quality for quality in qualities if rng.random() < 0.5]
    remarks = [quality for quality in qualities if quality not in adverbs]
    joiner = rng.choice((" ", " and ")) if len(adverbs) == 2 else " "
    said = " " + joiner.join(rng.choice(vocabulary.adverbs[quality]) for quality in adverbs) if adverbs else ""
    return said + "".join(f", {rng.choice(vocabulary.remarks[quality])}" for quality in remarks)


def head(sound: Sound, names: list[str], front: str, rng: random.Random) -> str:
    """The notes with adjectives before them."""
    if sound.is_chord:
        return chord_words(names, front, rng)
    if len(names) == 1:
        single = (f"a {front} {names[0]}", f"a {front} note {names[0]}", f"{front} {names[0]}") if front else ()
        return rng.choice(single or (names[0], names[0], f"a {names[0]}", f"the note {names[0]}"))
    listed, is_plain = row_words(names, rng)
    if not front:
        return f"{rng.choice(('the notes', 'notes'))} {listed}" if rng.random() < (0.6 if is_plain else 0.2) else listed
    return f"{rng.choice(('the', 'some', ''))} {front} notes {listed}".lstrip()


def row_words(names: list[str], rng: random.Random) -> tuple[str, bool]:
    """(notes one after the other, whether the word 'notes' makes plain that they are no chord)."""
    joiner = rng.choice((" then ", ", then ", " and then ", ", ", " ", " followed by ", " and "))
    if joiner == " and ":
        return ", ".join(names[:-1]) + f" and {names[-1]}", True
    return joiner.join(names), False


def chord_words(names: list[str], front: str, rng: random.Random) -> str:
    """The notes of a chord, now and then not from low to high."""
    names = rng.sample(names, len(names)) if rng.random() < 0.1 else names
    together = ", ".join(names[:-1]) + f" and {names[-1]}"
    if not front and rng.random() < 0.25:
        return f"{together} {rng.choice(('together', 'at once', 'at the same time'))}"
    listed = rng.choice((together, together, " ".join(names), " ".join(names), " and ".join(names), ", ".join(names)))
    start = rng.choice(("a {} chord of", "{} chord of", "the {} chord", "a {} chord with", "{} chord"))
    return f"{start.format(front).replace('  ', ' ').lstrip()} {listed}"


def spelled(notes: tuple[str, ...], rng: random.Random, open_octave_share: float) -> list[str]:
    """One spelling for all notes of a request: 'F#4', 'f#4', 'F sharp 4', 'Gb4', 'g flat 4', 'F#' (of octave 4)."""
    has_octave = any(note[-1] != DEFAULT_OCTAVE for note in notes) or rng.random() >= open_octave_share
    style = rng.choices(("plain", "sharp", "flat", "flats"), (0.7, 0.12, 0.06, 0.12))[0]
    names = [spell(note, style, has_octave) for note in notes]
    return [name.lower() for name in names] if rng.random() < 0.35 else names


def spell(note: str, style: str, has_octave: bool) -> str:
    name, octave = note[:-1], note[-1] if has_octave else ""
    if "#" not in name or style == "plain":
        return name + octave
    if style == "flats":
        return FLATS[name] + octave
    letter = name[0] if style == "sharp" else FLATS[name][0]
    return f"{letter} {style} {octave}".rstrip()
