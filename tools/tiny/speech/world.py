"""The world of the tiny speaking model: its words, and sentences of one to five of them in any order.

`tools.tiny.speech.synthesise` speaks a sentence, `tools.tiny.speech.requests` asks for it, and
`tools.tiny.speech.judge` hears which words a recording holds. Sentences for which `is_held_out` is true never occur in
training.
"""

from __future__ import annotations

import hashlib
import random

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black")
SHAPES = ("circle", "square", "triangle", "star", "diamond")
PLACES = ("left", "right", "above", "below", "between")
OTHERS = ("yes", "no", "hello", "stop", "music", "water", "happy", "window", "garden")
WORDS = DIGITS + COLOURS + SHAPES + PLACES + OTHERS
MAX_WORDS = 5
HELD_OUT_SHARE = 20  # one in so many sentences of two words or more

Sentence = tuple[str, ...]


def is_held_out(words: Sentence) -> bool:
    """Whether this sentence is kept for judging, however it is asked for."""
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()
    return len(words) > 1 and int(digest, 16) % HELD_OUT_SHARE == 0


def sentence(rng: random.Random, *, held_out: bool = False) -> Sentence:
    """A random sentence, one that is kept for judging or one that is not. Words may repeat."""
    while True:
        words = tuple(rng.choices(WORDS, k=rng.randint(1, MAX_WORDS)))
        if is_held_out(words) == held_out:
            return words
