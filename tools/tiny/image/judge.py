"""Whether a picture shows a scene: the detector's findings against the words' meaning."""

from __future__ import annotations

from itertools import permutations

import numpy as np

from tools.tiny.image.detect import Found, Report, detect
from tools.tiny.image.world import Scene, Thing

GREY_RANGES = {"dark": (25, 90), "grey": (90, 168), "light": (168, 245)}
NEAR, FAR = 0.4, 0.6
# Half way between the sizes of the world (0.1, 0.14 and 0.19 of the side), for a circle; and how much farther from the
# centre than a circle's edge the corners of the other shapes lie at the same size.
MOST_SMALL, LEAST_LARGE = 0.12, 0.165
CORNERS = {"circle": 1.0, "ring": 1.0, "square": 1.2, "diamond": 1.1, "triangle": 1.15, "star": 1.15}
AXES = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


def is_right(image: np.ndarray, scene: Scene) -> bool:
    """image: [S, S, 3] uint8. Every thing once and nothing else; colours, shapes, stated sizes, layout and
    background all right.
    """
    return complaint(image, scene) is None


def complaint(image: np.ndarray, scene: Scene) -> str | None:
    """The first thing that is wrong, or None."""
    return complaint_about(detect(image), scene)


def complaint_about(report: Report, scene: Scene) -> str | None:
    """The same of what was found in a picture."""
    if len(report.things) != len(scene.things):
        return f"{len(report.things)} things instead of {len(scene.things)}"
    if scene.background and not GREY_RANGES[scene.background][0] <= report.grey <= GREY_RANGES[scene.background][1]:
        return f"background {report.grey:.0f} is not {scene.background}"
    matches = [order for order in permutations(report.things) if all(map(is_thing, order, scene.things))]
    if not matches:
        return "saw " + ", ".join(f"{found.colour} {found.shape} {found.radius:.3f}" for found in report.things)
    if not any(has_layout(order, scene.layout) for order in matches):
        return f"not {scene.layout}"
    return None


def is_thing(found: Found, thing: Thing) -> bool:
    nominal = found.radius / CORNERS[found.shape]
    size_is_right = {None: True, "small": nominal < MOST_SMALL, "large": nominal > LEAST_LARGE}[thing.size]
    return found.colour == thing.colour and found.shape == thing.shape and size_is_right


def has_layout(things: tuple[Found, ...], layout: str | None) -> bool:
    if layout is None:
        return True
    if layout in AXES:
        axis, sign = AXES[layout]
        first, second = ((thing.x, thing.y) if axis == "x" else (thing.y, thing.x) for thing in things)
        return sign * (first[0] - second[0]) > 0.15 and abs(first[1] - second[1]) < abs(first[0] - second[0])
    if layout == "in a row":
        return things[0].x < things[1].x < things[2].x
    if layout == "in a column":
        return things[0].y < things[1].y < things[2].y
    return is_at_place(things[0], layout)


def is_at_place(thing: Found, place: str) -> bool:
    wanted_x = -1 if "left" in place else 1 if "right" in place else 0
    wanted_y = -1 if "top" in place else 1 if "bottom" in place else 0
    return third(thing.x) == wanted_x and third(thing.y) == wanted_y


def third(value: float) -> int:
    return -1 if value < NEAR else 1 if value > FAR else 0
