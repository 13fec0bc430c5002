"""Validation of values from outside. Knows no request and no config, only numbers and names."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import SupportsFloat, SupportsInt, cast

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
    """`repr` for an error message: at most 80 characters, and no crash over an integer of thousands of digits."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return f"a {type(value).__name__} too long to print"


def is_finite(value: object) -> bool:
    """Whether a number is neither NaN nor infinite and fits a float (an integer of a thousand digits does not)."""
    try:
        return math.isfinite(cast(SupportsFloat, value))
    except OverflowError:
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
