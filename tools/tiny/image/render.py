"""Draws a scene: where its things stand (with a little jitter), how large they are, and the pixels."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from tools.tiny.image.world import COLOURS, Scene, Thing

SIZE = 128
SUPERSAMPLING = 4
STAR_INNER_RADIUS = 0.4
RING_INNER_RADIUS = 0.55
RADII = {"small": 0.1, None: 0.14, "large": 0.19}
GREYS = {"dark": (40, 70), "grey": (110, 145), "light": (190, 220), None: (40, 220)}
NEAR, MIDDLE, FAR = 0.26, 0.5, 0.74
PLACE_CENTRES = {
    "in the center": (MIDDLE, MIDDLE),
    "at the top": (MIDDLE, NEAR),
    "at the bottom": (MIDDLE, FAR),
    "on the left": (NEAR, MIDDLE),
    "on the right": (FAR, MIDDLE),
    "in the top left corner": (NEAR, NEAR),
    "in the top right corner": (FAR, NEAR),
    "in the bottom left corner": (NEAR, FAR),
    "in the bottom right corner": (FAR, FAR),
    None: (MIDDLE, MIDDLE),
}
PAIR_CENTRES = {
    "left of": ((NEAR, MIDDLE), (FAR, MIDDLE)),
    "right of": ((FAR, MIDDLE), (NEAR, MIDDLE)),
    "above": ((MIDDLE, NEAR), (MIDDLE, FAR)),
    "below": ((MIDDLE, FAR), (MIDDLE, NEAR)),
    None: ((NEAR, MIDDLE), (FAR, MIDDLE)),
}
LINE_POSITIONS = (0.165, 0.5, 0.835)
LINE_SCALE = 0.85


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing with its centre and circumscribed radius, all as fractions of the picture's side."""

    thing: Thing
    x: float
    y: float
    radius: float


def centres(scene: Scene) -> tuple[tuple[float, float], ...]:
    if len(scene.things) == 1:
        return (PLACE_CENTRES[scene.layout],)
    if len(scene.things) == 2:
        return PAIR_CENTRES[scene.layout]
    if scene.layout == "in a column":
        return tuple((MIDDLE, p) for p in LINE_POSITIONS)
    return tuple((p, MIDDLE) for p in LINE_POSITIONS)


def place(scene: Scene, rng: random.Random, jitter: float = 0.02) -> tuple[list[Placed], int]:
    """The placed things and the grey level of the background."""
    placed, scale = [], LINE_SCALE if len(scene.things) == 3 else 1.0
    for thing, (x, y) in zip(scene.things, centres(scene), strict=True):
        radius = RADII[thing.size] * scale * rng.uniform(0.95, 1.05)
        placed.append(Placed(thing, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter), radius))
    return placed, rng.randint(*GREYS[scene.background])


def render(placed: list[Placed], grey: int, size: int = SIZE) -> np.ndarray:
    """[size, size, 3] uint8, antialiased."""
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    for item in placed:
        draw_shape(draw, item, side, grey)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def draw_shape(draw: ImageDraw.ImageDraw, item: Placed, side: int, grey: int) -> None:
    x, y, r = item.x * side, item.y * side, item.radius * side
    colour = COLOURS[item.thing.colour]
    match item.thing.shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        case "ring":
            inner = r * RING_INNER_RADIUS
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=(grey, grey, grey))
        case "square":
            half = r * 0.85
            draw.rectangle((x - half, y - half, x + half, y + half), fill=colour)
        case "diamond":
            draw.polygon(corners(x, y, (r * 1.1,), 4), fill=colour)
        case "triangle":
            draw.polygon(corners(x, y + r * 0.2, (r * 1.15,), 3), fill=colour)
        case "star":
            draw.polygon(corners(x, y, (r * 1.15, r * 1.15 * STAR_INNER_RADIUS), 10), fill=colour)
        case _:
            raise ValueError(f"unknown shape {item.thing.shape!r}")


def corners(x: float, y: float, radii: tuple[float, ...], count: int) -> list[tuple[float, float]]:
    """Corners of a regular polygon whose first corner points up; the radii take turns."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return [
        (x + radii[i % len(radii)] * math.sin(a), y - radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)
    ]


def draw_scene(scene: Scene, rng: random.Random, size: int = SIZE) -> np.ndarray:
    """[size, size, 3] uint8: one random drawing of the scene."""
    placed, grey = place(scene, rng)
    return render(placed, grey, size)
