"""Judges a picture: finds coloured shapes by colour, area and outline alone. Shares nothing with the code that draws.

Each blob of one palette colour is measured: its area, its filled area (a hole makes a ring), how its outline's
distance from the centre varies with the angle (five peaks make a star), how much of its bounding box it fills and
where its mass lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 40),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
    "cyan": (40, 200, 210),
    "pink": (245, 130, 180),
}
MIN_AREA = 0.004
MIN_SATURATION = 45
NUM_ANGLES = 180


@dataclass(frozen=True, slots=True)
class Found:
    """One blob: what it is, its centre and the radius of its outline's farthest point, as fractions of the
    picture's side.
    """

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything in a picture, and the grey level behind it."""

    things: tuple[Found, ...]
    grey: float


def detect(image: np.ndarray) -> Report:
    """image: [S, S, 3] uint8."""
    pixels = image.astype(np.float32)
    colourful = pixels.max(2) - pixels.min(2) > MIN_SATURATION
    background = np.median(pixels[~colourful], axis=0) if (~colourful).any() else np.zeros(3)
    blobs, count = ndimage.label(colourful, structure=np.ones((3, 3)))
    things = []
    for index in range(1, count + 1):
        mask = blobs == index
        if mask.sum() >= MIN_AREA * mask.size:
            things.append(describe(mask, pixels))
    return Report(tuple(things), float(background.mean()))


def describe(mask: np.ndarray, pixels: np.ndarray) -> Found:
    core = ndimage.binary_erosion(mask)
    colour = np.median(pixels[core if core.any() else mask], axis=0)
    name = min(PALETTE, key=lambda key: float(np.square(colour - PALETTE[key]).sum()))
    filled = ndimage.binary_fill_holes(mask)
    y, x = (float(c) + 0.5 for c in ndimage.center_of_mass(filled))
    distances = outline(filled, y, x)
    side = mask.shape[0]
    return Found(name, shape_of(mask, filled, distances), x / side, y / side, float(distances.max()) / side)


def outline(mask: np.ndarray, y: float, x: float) -> np.ndarray:
    """[NUM_ANGLES] distance in pixels from the centre to the blob's edge, clockwise from straight up."""
    angles = np.arange(NUM_ANGLES) * (2 * np.pi / NUM_ANGLES)
    steps = np.arange(0, mask.shape[0] / 1.5, 0.25)
    rows = y - 0.5 - np.outer(np.cos(angles), steps)
    columns = x - 0.5 + np.outer(np.sin(angles), steps)
    inside = ndimage.map_coordinates(mask.astype(np.float32), [rows, columns], order=1, mode="constant") > 0.5
    return np.where(inside, steps, 0).max(axis=1)


def shape_of(mask: np.ndarray, filled: np.ndarray, distances: np.ndarray) -> str:
    """From the hole, and from the strengths of the outline's waves: 3, 4 and 5 peaks, and which way they point."""
    if mask.sum() < 0.9 * filled.sum():
        return "ring"
    waves = np.fft.rfft(distances) / distances.mean() / NUM_ANGLES * 2
    three, four, five = (abs(waves[k]) for k in (3, 4, 5))
    if max(three, four, five) < 0.06:
        return "circle"
    if five > max(three, four):
        return "star"
    if three > four:
        return "triangle"
    return "diamond" if waves[4].real > 0 else "square"
