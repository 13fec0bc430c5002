"""Validation of values from outside. Knows no request and no config, only numbers and names."""

from __future__ import annotations

import difflib
import enum
import math
import numbers
import reprlib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, SupportsFloat, SupportsInt, cast

from vllm_omni.errors import OmniError


def check_number(
    where: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    raises: type[OmniError],
    integer: bool = False,
    above_low: bool = False,
    hint: str = "",
) -> None:
    """Raises unless `value` is a finite number (no bool) in [low, high], or (low, high]. hint: ends the message."""
    complaint = number_complaint(where, value, low, high, integer=integer, above_low=above_low)
    if complaint:
        raise raises(complaint + hint)


def number_complaint(
    where: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    integer: bool = False,
    above_low: bool = False,
) -> str | None:
    """None when `value` is a finite number (no bool) within [low, high] (or (low, high]), else the complaint."""
    kind = numbers.Integral if integer else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not is_finite(value):
        return f"{where}: got {brief(value)}, expected {'an integer' if integer else 'a finite number'}"
    number = int(cast(SupportsInt, value)) if integer else float(value)  # a float would round a large integer
    too_low = low is not None and (number <= low if above_low else number < low)
    if too_low or (high is not None and number > high):
        return f"{where}: got {brief(value)}, expected {_range_words(low, high, above_low)}"
    return None


def brief(value: object) -> str:
    """A value for an error message: at most 80 characters. Of a foreign object only its type is said, since its own
    `repr` may raise, or never end.
    """
    try:
        return f"{_REPR.repr(value):.80}"
    except Exception:  # an integer of thousands of digits; a subclass of a plain type that misbehaves
        return f"a {type(value).__name__} too long to print"


class _BoundedRepr(reprlib.Repr):
    """Plain values and the first items of plain containers as Python writes them, other objects by their type."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80
        self.maxlevel = 3

    def repr1(self, x: Any, level: int) -> str:
        kind = type(x)
        if kind in _PLAIN_TYPES:
            return repr(x)
        if kind in (str, bytes):
            return repr(x[:80])
        if kind in _CONTAINER_TYPES:
            return super().repr1(x, level)
        if isinstance(x, (enum.Enum, PurePath)):
            return repr(x)
        return f"a value of type {kind.__name__}"


_PLAIN_TYPES = {int, float, complex, bool, type(None), range}
_CONTAINER_TYPES = {list, tuple, dict, set, frozenset}
_REPR = _BoundedRepr()


def is_finite(value: object) -> bool:
    """Whether a number is neither NaN nor infinite and fits a float (an integer of a thousand digits does not)."""
    try:
        return math.isfinite(cast(SupportsFloat, value))
    except Exception:  # an OverflowError, or whatever a foreign kind of number raises
        return False


def _range_words(low: float | None, high: float | None, above_low: bool) -> str:
    most = "" if high is None else f"at most {_plain(high)}"
    if low is None:
        return most
    least = f"{'more than' if above_low else 'at least'} {_plain(low)}"
    return f"{least} and {most}" if most else least


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for a near miss, else the list of what is known."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(options)})" if options else ""
