"""Says a scene in loose words: synonyms, polite frames, reversed relations. Pure text."""

from __future__ import annotations

import hashlib
import random

from tools.tiny.image.world import Scene, Thing, with_article

SHAPE_WORDS = {
    "circle": ("circle", "ball", "disc", "round thing", "dot"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid"),
    "diamond": ("diamond", "lozenge", "rhombus"),
    "star": ("star", "five-pointed star"),
    "ring": ("ring", "hoop", "donut"),
}
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "yellow": ("yellow", "golden"),
    "orange": ("orange", "tangerine"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise", "teal"),
    "pink": ("pink", "rose"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge", "giant")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of", "on the left-hand side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right-hand side of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "beneath", "under", "underneath"),
}
REVERSED_WORDS = {
    "left of": ("to its left", "on its left", "on its left-hand side"),
    "right of": ("to its right", "on its right", "on its right-hand side"),
    "above": ("above it", "over it", "on top of it"),
    "below": ("below it", "beneath it", "underneath it", "under it"),
}
PLACE_WORDS = {
    "in the center": ("in the center", "in the middle", "in the centre"),
    "at the top": ("at the top", "at the very top"),
    "at the bottom": ("at the bottom", "at the very bottom"),
    "on the left": ("on the left", "on the left side", "on the left-hand side"),
    "on the right": ("on the right", "on the right side", "on the right-hand side"),
    "in the top left corner": ("in the top left corner", "in the upper left corner", "at the top left"),
    "in the top right corner": ("in the top right corner", "in the upper right corner", "at the top right"),
    "in the bottom left corner": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "in the bottom right corner": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}
LINE_WORDS = {
    "in a row": ("in a row", "side by side", "next to each other"),
    "in a column": ("in a column", "one above the other", "stacked up"),
}
BACKGROUND_WORDS = {
    "dark": ("dark", "black"),
    "grey": ("grey", "gray"),
    "light": ("light", "pale", "bright"),
}
FRAMES = (
    "{}",
    "{} please",
    "please paint {}",
    "please draw {}",
    "could you draw me {}?",
    "can you paint {} for me?",
    "draw {}",
    "paint {}",
    "show me {}",
    "i would like {}",
    "i want to see {}",
    "make a picture of {}",
    "give me a picture of {}",
    "let me see {}",
    "a picture of {}, please",
)


def loose(scene: Scene, rng: random.Random) -> str:
    """One loose request that means `scene`."""
    words = scene_words(scene, rng)
    request = rng.choice(FRAMES).format(words)
    return request[0].upper() + request[1:] if rng.random() < 0.3 else request


def scene_words(scene: Scene, rng: random.Random) -> str:
    """Loose words for `scene` without the request around them."""
    phrases = [thing_words(thing, rng) for thing in scene.things]
    if len(phrases) == 1:
        words = phrases[0] + (f" {rng.choice(PLACE_WORDS[scene.layout])}" if scene.layout else "")
    elif len(phrases) == 2:
        words = pair_words(phrases, scene.layout, rng)
    else:
        words = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
        words += f" {rng.choice(LINE_WORDS[scene.layout])}" if scene.layout else ""
    if scene.background:
        ground = rng.choice(("background", "backdrop"))
        words += f" on {with_article(rng.choice(BACKGROUND_WORDS[scene.background]))} {ground}"
    return words


def thing_words(thing: Thing, rng: random.Random) -> str:
    size = rng.choice(SIZE_WORDS[thing.size]) if thing.size else None
    colour, shape = rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])
    return with_article(" ".join(word for word in (size, colour, shape) if word))


def pair_words(phrases: list[str], relation: str | None, rng: random.Random) -> str:
    if relation is None:
        return f"{phrases[0]} {rng.choice(('and', 'next to', 'beside'))} {phrases[1]}"
    if rng.random() < 0.35:
        return f"{phrases[1]} with {phrases[0]} {rng.choice(REVERSED_WORDS[relation])}"
    return f"{phrases[0]} {rng.choice(RELATION_WORDS[relation])} {phrases[1]}"


def is_held_out(request: str) -> bool:
    """One request in twenty is kept for judging, chosen by its text alone."""
    return hashlib.sha256(request.encode()).digest()[0] % 20 == 0
