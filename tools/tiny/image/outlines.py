"""Scenes drawn by hand: wobbly coloured outlines instead of filled shapes; and whether a picture shows one."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from tools.tiny.image.detect import Found, Report, describe, detect
from tools.tiny.image.judge import complaint_about
from tools.tiny.image.render import SIZE, STAR_INNER_RADIUS, SUPERSAMPLING, Placed, corners, place
from tools.tiny.image.world import COLOURS, Scene

LINE = 0.022  # width, as a fraction of the picture's side
WOBBLE = 0.05  # of the radius, at most
POINTS = 96  # of an outline
LEAST_HOLLOW = 0.88  # a blob that fills less of its outline is a line
CIRCLE_CORNERS = 48
GAP = 2  # pixels on each side of a break in a line, which is closed before what is inside is measured
MIN_SATURATION = 45  # of a line, as of a filled shape


def draw_outlines(scene: Scene, rng: random.Random, size: int = SIZE) -> np.ndarray:
    """[size, size, 3] uint8: one random drawing of the scene."""
    placed, grey = place(scene, rng)
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    for item in placed:
        points = wobbled(outline_of(item), item, rng)
        line = [(x * side, y * side) for x, y in points]
        draw.line([*line, *line[:2]], fill=COLOURS[item.thing.colour], width=round(LINE * side), joint="curve")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def outline_of(item: Placed) -> list[tuple[float, float]]:
    """Corners, as fractions of the side; of the sizes that filled shapes have."""
    x, y, r = item.x, item.y, item.radius
    match item.thing.shape:
        case "circle":
            return corners(x, y, (r,), CIRCLE_CORNERS)
        case "square":
            half = r * 0.85
            return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
        case "diamond":
            return corners(x, y, (r * 1.1,), 4)
        case "triangle":
            return corners(x, y + r * 0.2, (r * 1.15,), 3)
        case "star":
            return corners(x, y, (r * 1.15, r * 1.15 * STAR_INNER_RADIUS), 10)
        case _:
            raise ValueError(f"no outline of shape {item.thing.shape!r}")


def wobbled(points: list[tuple[float, float]], item: Placed, rng: random.Random) -> list[tuple[float, float]]:
    """POINTS points along the outline, moved away from the centre and towards it in three slow waves."""
    waves = [(count, rng.uniform(0, WOBBLE / 3), rng.uniform(0, 2 * math.pi)) for count in (2, 3, 7)]
    lengths = [math.dist(a, b) for a, b in zip(points, points[1:] + points[:1], strict=True)]
    found = []
    for (ax, ay), (bx, by), length in zip(points, points[1:] + points[:1], lengths, strict=True):
        for step in range(count := max(1, round(POINTS * length / sum(lengths)))):
            x, y = ax + (bx - ax) * step / count, ay + (by - ay) * step / count
            angle = math.atan2(y - item.y, x - item.x)
            factor = 1 + sum(size * math.sin(waving * angle + phase) for waving, size, phase in waves)
            found.append((item.x + (x - item.x) * factor, item.y + (y - item.y) * factor))
    return found


def complaint(image: np.ndarray, scene: Scene) -> str | None:
    """The first thing that is wrong with a picture of outlines, or None. image: [S, S, 3] uint8. As of filled shapes,
    and every shape must be a line around nothing.
    """
    report, pixels = detect(image), image.astype(np.float32)
    things = tuple(filled(found, pixels) for found in report.things)
    if None in things:
        return "a shape is filled"
    return complaint_about(Report(tuple(found for found in things if found is not None), report.grey), scene)


def filled(found: Found, pixels: np.ndarray) -> Found | None:
    """What the outline is an outline of, as large as the middle of its line; None where it is none."""
    side = len(pixels)
    colourful = pixels.max(2) - pixels.min(2) > MIN_SATURATION
    padded = np.pad(colourful, GAP)
    whole = ndimage.binary_fill_holes(ndimage.binary_closing(padded, np.ones((3, 3)), iterations=GAP))
    whole = whole[GAP:-GAP, GAP:-GAP]
    inside, _ = ndimage.label(whole)
    number = inside[min(int(found.y * side), side - 1), min(int(found.x * side), side - 1)]
    mask = inside == number
    if number == 0 or (mask & colourful).sum() > LEAST_HOLLOW * mask.sum():
        return None
    shape = describe(mask, np.where(mask[..., None], pixels, 0)).shape
    return Found(found.colour, shape, found.x, found.y, found.radius - LINE / 2)
