"""What people say to the tiny speaking model: requests to read out some words, figures for digits among them."""

from __future__ import annotations

import random

from tools.tiny.speech.world import DIGITS, Sentence

REQUESTS = (
    "{}",
    "read {}",
    "say {}",
    "speak {}",
    "read out {}",
    "read aloud {}",
    "pronounce {}",
    "tell me {}",
    "repeat {}",
    "repeat after me: {}",
    "please read {}",
    "please say {}",
    "please read out {}",
    "say {} please",
    "read {} please",
    "now say {}",
    "can you say {}",
    "can you read {}",
    "can you read out {}",
    "could you say {}",
    "could you read out {}",
    "would you please say {}",
    "will you read {} to me",
    "read {} to me",
    "read this: {}",
    "read these words: {}",
    "say these words: {}",
    "say the following: {}",
    "let me hear {}",
    "I want to hear {}",
    "I would like you to say {}",
    "how does {} sound",
    "what does {} sound like",
    "the words are {}",
)
QUESTIONS = ("can", "could", "would", "will", "how", "what")
JOINTS = (" ", " ", " ", ", ", ", ", "; ", " - ")


def answer(words: Sentence) -> str:
    """What the thinker writes, and the talker reads."""
    return " ".join(words)


def request(words: Sentence, rng: random.Random) -> str:
    """One of the ways to ask for these words."""
    wording = rng.choice(REQUESTS)
    if ":" not in wording and wording != "{}" and rng.random() < 0.15:
        wording = wording.replace(" {}", ": {}")
    listed = listing(words, rng)
    if rng.random() < 0.15:
        listed = f'"{listed}"'
    asked = wording.format(listed)
    if rng.random() < 0.3:
        asked = asked[0].upper() + asked[1:]
    if wording.startswith(QUESTIONS):
        return asked + rng.choice(("?", "?", ""))
    return asked + rng.choice(("", "", "", "!", "."))


def listing(words: Sentence, rng: random.Random) -> str:
    """The words in a row, with figures for none, some or all of the digits."""
    figures = rng.choice((0.0, 0.5, 1.0))
    shown = [str(DIGITS.index(word)) if word in DIGITS and rng.random() < figures else word for word in words]
    if rng.random() < 0.1:
        shown = [word.capitalize() for word in shown]
    joint = rng.choice(JOINTS)
    ends_in_and = len(shown) > 1 and joint != " - " and rng.random() < 0.15
    return joint.join(shown[:-1]) + f" and {shown[-1]}" if ends_in_and else joint.join(shown)
