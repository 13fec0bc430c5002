"""Odd versions of plain trees (what YAML and JSON hold), of text and of bytes; every choice comes from the Random."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

HUGE = [2**31, 2**63, 10**30, 10**400, 900_000_000, 1e18, 1e308, float("inf"), float("-inf"), float("nan")]
SMALL = [None, True, False, -1, 0, 1, 2, 0.1, -0.5]
WORDS = [
    "",
    "x",
    "x" * 5_000,
    "\ud800",
    "../..",
    "..",
    "/",
    "~nosuchuser",
    "${model}",
    "${a.b}",
    "${oc.env:HOME}",
    "\0",
]
SIGNS = [*"{}[]:,\"'&*!|>%@`#\n\t\0", "\ud7ff", "\ufeff", "- ", "<<: ", "? "]
TAGS = ["!!int", "!!float x", "!!python/object:os.system", "!!binary", "!!timestamp", "!x "]
NAMES = ["asset://tiny-image", "asset://nothing", "auto", "cpu", "cuda:7", "float16", "inline", "thread", "first_block"]


def deep(levels: int) -> Any:
    """A list in a list in a list ..."""
    tree: Any = 1
    for _ in range(levels):
        tree = [tree]
    return tree


def odd_value(random: Random) -> Any:
    """Any plain value."""
    return random.choice(
        [
            *(random.choice(values) for values in (HUGE, SMALL, WORDS, NAMES)),
            random.choice([[], {}, [[]], [None], {"a": 1}, {1: 2}, [1] * 2_000, deep(40), {"": ""}]),
        ]
    )


def mutate(tree: Any, random: Random, times: int | None = None) -> Any:
    """A copy of a tree with some of its places changed, dropped, doubled or swapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(times or random.choice([1, 1, 1, 2, 3, 8])):
        places = list(_places(tree))
        if not places:
            return odd_value(random)
        group, key = random.choice(places)
        _change(group, key, places, random)
    return tree


def mutate_text(text: str, random: Random) -> str:
    """Characters dropped, doubled, replaced or cut off."""
    for _ in range(random.choice([1, 2, 5, 30])):
        at = random.randrange(len(text) + 1)
        what = random.choice(["drop", "double", "insert", "cut", "tag"])
        if what == "drop":
            text = text[:at] + text[at + random.choice([1, 3, 40]) :]
        elif what == "double":
            text = text[:at] + text[max(0, at - 30) : at] * random.choice([1, 2, 50]) + text[at:]
        elif what == "insert":
            text = text[:at] + random.choice(SIGNS) + text[at:]
        elif what == "tag":
            text = text[:at] + random.choice(TAGS) + text[at:]
        elif random.random() < 0.2:
            text = text[:at]
    return text


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """Bytes changed, cut off or added."""
    changed = bytearray(content)
    for _ in range(random.choice([1, 4, 64])):
        if changed:
            changed[random.randrange(min(len(changed), random.choice([16, 4096, len(changed)])))] = random.randrange(
                256
            )
    if random.random() < 0.3:
        del changed[random.randrange(len(changed) + 1) :]
    return bytes(changed) + (b"x" * random.choice([1, 100]) if random.random() < 0.1 else b"")


def _places(tree: Any) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def _change(group: Any, key: Any, places: list[Any], random: Random) -> None:
    what = random.random()
    if what < 0.55:
        group[key] = odd_value(random)
    elif what < 0.7:
        del group[key]
    elif what < 0.8 and isinstance(group, dict):
        group[random.choice([f"{key}x", "x", "import", "from", "extra", 3])] = group[key]
    elif what < 0.9:
        other, at = random.choice(places)
        group[key] = copy.deepcopy(other[at])
    elif isinstance(group[key], (int, float)) and not isinstance(group[key], bool):
        number = group[key]
        group[key] = random.choice([-number, number * 10, number * 10**6, str(number)])
    else:
        group[key] = [group[key]]
