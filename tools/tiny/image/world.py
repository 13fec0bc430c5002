"""The world of the tiny image model: scenes of coloured shapes, and their canonical words.

A scene is what is meant; `tools.tiny.image.render` draws it, `tools.tiny.image.loose` says it in other words and
`tools.tiny.image.detect` judges a picture of it. The (colour, shape) pairs in `UNSEEN` never occur in training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 40),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
    "cyan": (40, 200, 210),
    "pink": (245, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring")
SIZES = ("small", "large")
BACKGROUNDS = ("dark", "grey", "light")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = (
    "in the center",
    "at the top",
    "at the bottom",
    "on the left",
    "on the right",
    "in the top left corner",
    "in the top right corner",
    "in the bottom left corner",
    "in the bottom right corner",
)
LINES = ("in a row", "in a column")
UNSEEN = frozenset(
    {
        ("purple", "circle"),
        ("orange", "square"),
        ("cyan", "triangle"),
        ("pink", "diamond"),
        ("green", "star"),
        ("yellow", "ring"),
    }
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. `size` None means that the words leave it open."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def words(self) -> str:
        """Noun phrase without its article."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)

    @property
    def is_unseen(self) -> bool:
        return (self.colour, self.shape) in UNSEEN


@dataclass(frozen=True, slots=True)
class Scene:
    """One to three things, how they stand (a place, a relation, a line, or None when left open), and the background."""

    things: tuple[Thing, ...]
    layout: str | None = None
    background: str | None = None

    @property
    def has_unseen(self) -> bool:
        return any(thing.is_unseen for thing in self.things)


def with_article(words: str) -> str:
    """'orange ring' -> 'an orange ring'."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def canonical(scene: Scene) -> str:
    """The one wording that the image model is trained on."""
    phrases = [with_article(thing.words) for thing in scene.things]
    if len(phrases) == 1:
        words = phrases[0] + (f" {scene.layout}" if scene.layout else "")
    elif len(phrases) == 2:
        words = f"{phrases[0]} {scene.layout or 'and'} {phrases[1]}"
    else:
        words = f"{phrases[0]}, {phrases[1]} and {phrases[2]}" + (f" {scene.layout}" if scene.layout else "")
    return words + (f" on a {scene.background} background" if scene.background else "")


def sample_thing(rng: random.Random, sizes: tuple[str, ...], allow_unseen: bool) -> Thing:
    while True:
        size = rng.choice(sizes) if rng.random() < 0.4 else None
        thing = Thing(rng.choice(tuple(COLOURS)), rng.choice(SHAPES), size)
        if allow_unseen or not thing.is_unseen:
            return thing


def sample_scene(rng: random.Random, *, allow_unseen: bool = False, num_things: int | None = None) -> Scene:
    """A random scene; pairs are the most frequent, since they are the hardest to learn."""
    count = num_things or rng.choices((1, 2, 3), (0.3, 0.5, 0.2))[0]
    sizes = SIZES if count < 3 else ("small",)
    things = tuple(sample_thing(rng, sizes, allow_unseen) for _ in range(count))
    layouts = {1: PLACES, 2: RELATIONS, 3: LINES}[count]
    open_share = {1: 0.3, 2: 0.1, 3: 0.3}[count]
    layout = None if rng.random() < open_share else rng.choice(layouts)
    background = rng.choice(BACKGROUNDS) if rng.random() < 0.4 else None
    return Scene(things, layout, background)
