"""The musical facts of a request, each checked and as ACE-Step was trained to read it; None is not known.

Ranges, keys and languages are those of ace-step/ACE-Step-1.5 (acestep/constants.py).
"""

from __future__ import annotations

import re
from typing import Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.checks import brief, check_number

BPM = (30, 300)
TIME_SIGNATURES = ("2", "3", "4", "6")
LANGUAGES = (
    "ar, az, bg, bn, ca, cs, da, de, el, en, es, fa, fi, fr, he, hi, hr, ht, hu, id, is, it, ja, ko, la, lt, ms, ne, "
    "nl, no, pa, pl, pt, ro, ru, sa, sk, sr, sv, sw, ta, te, th, tl, tr, uk, ur, vi, yue, zh, unknown"
)
KEYSCALE = re.compile(r"([A-G])([#b♯♭]?)\s+(major|minor)", re.IGNORECASE)


def read_bpm(value: Any) -> int | None:
    if value is not None:
        check_number("bpm", value, *BPM, integer=True, raises=InvalidRequestError, hint=" (beats per minute)")
    return None if value is None else int(value)


def read_keyscale(value: object) -> str | None:
    """As ACE-Step writes it: "F# minor"."""
    if value is None:
        return None
    found = KEYSCALE.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 80 else None
    if found is None:
        raise InvalidRequestError(
            f"keyscale: got {brief(value)}, expected a note A to G, perhaps # or b, and major or minor, as 'F# minor'"
        )
    note, accidental, mode = found.groups()
    return f"{note.upper()}{accidental.lower()} {mode.lower()}"


def read_timesignature(value: object) -> str | None:
    """Beats of a bar, a string or a number."""
    if value is None:
        return None
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10
    known = str(value) if is_count or isinstance(value, str) else None
    if known not in TIME_SIGNATURES:
        raise InvalidRequestError(
            f"timesignature: got {brief(value)}, expected {listed(TIME_SIGNATURES)}, the beats of a bar"
        )
    return known


def read_language(value: object) -> str:
    if not isinstance(value, str) or value not in LANGUAGES.split(", "):
        raise InvalidRequestError(f"vocal_language: got {brief(value)}, expected one of {LANGUAGES}")
    return value


def listed(values: tuple[str, ...]) -> str:
    """("a", "b", "c") -> "'a', 'b' or 'c'"."""
    return ", ".join(map(repr, values[:-1])) + f" or {values[-1]!r}"
