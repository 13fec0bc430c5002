"""Requests for the thinker of tiny-omni and the answers that it writes: a scene, a sound, both, or small talk."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.tiny.audio import world as sounds
from tools.tiny.audio.small_talk import small_talk
from tools.tiny.audio.words import NEAR, Vocabulary, phrase, wording
from tools.tiny.audio.world import Sound, sample_sound
from tools.tiny.image.loose import is_held_out, loose, scene_words
from tools.tiny.image.world import Scene, canonical, sample_scene

KINDS = ("scene", "sound", "both", "neither")
FAR = Vocabulary(
    adjectives={
        "loud": ("loud", "strong", "forceful"),
        "soft": ("soft", "quiet", "gentle"),
        "slow": ("slow", "long"),
        "fast": ("fast", "quick", "rapid", "short"),
        "sine": ("sine", "pure", "smooth"),
        "square": ("square wave", "chiptune", "8-bit"),
        "saw": ("saw", "sawtooth", "buzzy", "buzzing", "raspy"),
        "plucked": ("plucked", "twangy"),
    },
    remarks={
        "loud": (*NEAR.remarks["loud"], "loudly", "very loud"),
        "soft": (*NEAR.remarks["soft"], "gently", "softly"),
        "slow": (*NEAR.remarks["slow"], "slowly", "take your time"),
        "fast": (*NEAR.remarks["fast"], "quickly", "hurry up"),
        "sine": (*NEAR.remarks["sine"], "pure tone"),
        "square": (*NEAR.remarks["square"], "chiptune", "8-bit"),
        "saw": (*NEAR.remarks["saw"], "buzzy", "synth"),
        "plucked": (*NEAR.remarks["plucked"], "guitar", "harp", "strings"),
    },
    adverbs={
        "loud": ("loudly", "at full volume", "as loud as you can"),
        "soft": ("softly", "quietly", "gently", "at a low volume"),
        "slow": ("slowly", "at a slow pace", "without hurry"),
        "fast": ("fast", "quickly", "rapidly", "at a quick pace", "in a hurry"),
        "sine": (*NEAR.adverbs["sine"], "as a pure tone", "like a tuning fork", "like a whistle"),
        "square": (*NEAR.adverbs["square"], "like an old video game", "like a game console", "in chiptune style"),
        "saw": (*NEAR.adverbs["saw"], "on a synth", "on a buzzy synth", "like a buzzing bee"),
        "plucked": (*NEAR.adverbs["plucked"], "on a guitar", "on a harp", "like a guitar", "like a harp", "on strings"),
    },
    colon_share=0.0,
    open_octave_share=0.3,
)
SOUND_ORDERS = ("play {}", "play me {}", "play for me {}", "make the sound of {}", "strike {}", "sound {}")
SOUND_WISHES = ("let me hear {}", "i want to hear {}", "i would like to hear {}", "i would like {}", "give me {}")
SCENE_ORDERS = ("draw {}", "paint {}", "show me {}", "draw me {}", "make a picture of {}", "give me a picture of {}")
SCENE_WISHES = ("let me see {}", "i want to see {}", "i would like to see {}", "i would like a picture of {}")
ASIDES = {
    "scene": ("while showing {}", "while you show me {}", "while i look at {}", "and show {}", "with a picture of {}"),
    "sound": ("while playing {}", "while you play {}", "while i listen to {}", "and play {}", "with the sound of {}"),
}
POLITE = (
    "please {}",
    "{} please",
    "{}, please",
    "could you {}?",
    "can you {}?",
    "would you {} for me?",
    "can you {} now?",
)
JOINERS = (" and ", " then ", ", also ", ", and ", " and then ", " and also ", ". ", "; ", ", then ")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, what it means, and the answer that the thinker shall write."""

    words: str
    answer: str
    scene: Scene | None = None
    sound: Sound | None = None


def request(kind: str, rng: random.Random, *, held_out: bool = False) -> tuple[str, str]:
    """(request, answer) of `ask`."""
    asked = ask(kind, rng, held_out=held_out)
    return asked.words, asked.answer


def ask(kind: str, rng: random.Random, *, held_out: bool = False) -> Asked:
    """A request for training or, its text and its sound both, kept for judging."""
    while True:
        asked = say(kind, sample_scene(rng), sample_sound(rng, held_out=held_out), rng, 0.0 if held_out else 0.3)
        if is_held_out(asked.words) == held_out:
            return asked


def say(kind: str, scene: Scene, sound: Sound, rng: random.Random, direct_share: float = 0.3) -> Asked:
    """direct_share: of the requests that are already in the words of the other models."""
    is_direct = rng.random() < direct_share
    if kind == "scene":
        return Asked(canonical(scene) if is_direct else loose(scene, rng), answer_for(scene, None), scene)
    if kind == "sound":
        words = wording(sound, rng) if is_direct else loose_sound(sound, rng)
        return Asked(words, answer_for(None, sound), sound=sound)
    if kind == "both":
        return Asked(loose_both(scene, sound, rng, is_direct), answer_for(scene, sound), scene, sound)
    return Asked(*small_talk(rng))


def answer_for(scene: Scene | None, sound: Sound | None) -> str:
    """What the thinker writes: one line for each branch that shall run."""
    lines = [f"scene: {canonical(scene)}"] if scene else []
    return "\n".join(lines + ([f"sound: {sounds.canonical(sound)}"] if sound else []))


def loose_sound(sound: Sound, rng: random.Random) -> str:
    """One loose request for `sound`."""
    words = phrase(sound, rng, FAR)
    if rng.random() < 0.1:
        return capitalised(words, rng)
    return capitalised(framed(words, SOUND_ORDERS, SOUND_WISHES, rng), rng)


def loose_both(scene: Scene, sound: Sound, rng: random.Random, is_direct: bool = False) -> str:
    """One request for `scene` and `sound`, in either order."""
    seen = canonical(scene) if is_direct else scene_words(scene, rng)
    heard = wording(sound, rng) if is_direct else phrase(sound, rng, FAR)
    scene_first = rng.random() < 0.5
    way = rng.random()
    if way < 0.15:
        words = rng.choice(JOINERS).join((seen, heard) if scene_first else (heard, seen))
    elif way < 0.4:
        orders, wishes = (SCENE_ORDERS, SCENE_WISHES) if scene_first else (SOUND_ORDERS, SOUND_WISHES)
        main, aside = (seen, heard) if scene_first else (heard, seen)
        words = rng.choice(orders + wishes).format(main)
        words += " " + rng.choice(ASIDES["sound" if scene_first else "scene"]).format(aside)
    else:
        parts = [
            rng.choice(SCENE_ORDERS + SCENE_WISHES).format(seen),
            rng.choice(SOUND_ORDERS + SOUND_WISHES).format(heard),
        ]
        words = rng.choice(JOINERS).join(parts if scene_first else parts[::-1])
    is_order = words.startswith(("draw", "paint", "show", "make", "give", "play", "strike", "sound"))
    return capitalised(rng.choice(POLITE).format(words) if is_order and rng.random() < 0.3 else words, rng)


def framed(words: str, orders: tuple[str, ...], wishes: tuple[str, ...], rng: random.Random) -> str:
    """An order, a polite one or a wish around `words`."""
    way = rng.random()
    if way < 0.3:
        return rng.choice(wishes).format(words)
    order = rng.choice(orders).format(words)
    return rng.choice(POLITE).format(order) if way < 0.6 else order


def capitalised(words: str, rng: random.Random) -> str:
    return words[0].upper() + words[1:] if rng.random() < 0.3 else words
