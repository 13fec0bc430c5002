"""Values from outside as plain Python: numbers of numpy and torch as int and float, sequences as lists of bounded
length, mappings as dicts. Foreign code that such a value brings along may raise, or never end: it is read within
bounds, and whatever it raises becomes the error of the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from vllm_omni.errors import OmniError
from vllm_omni.utils.checks import brief, number_complaint

ARRAY_PACKAGES = ("numpy", "torch")
MAX_JSON_NUMBER = 1e300
T = TypeVar("T")


def as_number(
    where: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    raises: type[OmniError],
    integer: bool = False,
    above_low: bool = False,
    hint: str = "",
) -> Any:
    """An int (with `integer`) or a float or int, within [low, high] or (low, high]. A number of numpy, and an array or
    tensor without dimensions, count as what they hold.
    """
    if is_array(value) and getattr(value, "shape", None) == ():
        value = value.item()  # type: ignore[attr-defined]
    complaint = number_complaint(where, value, low, high, integer=integer, above_low=above_low)
    if complaint:
        raise raises(complaint + hint)
    if integer:
        return int(value)  # type: ignore[call-overload]
    return value if type(value) is int else float(value)  # type: ignore[arg-type]


def as_list(where: str, value: object, most: int, *, raises: type[OmniError], expected: str) -> list[Any]:
    """The items of a list, a tuple, a range or any other sequence but text, or of an array or tensor of one dimension;
    at most so many of them. expected: what the field takes, for the message.
    """
    if is_array(value) and len(getattr(value, "shape", ())) == 1:
        return _read(where, lambda: value[: most + 1].tolist(), most, raises, expected)  # type: ignore[index]
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise raises(f"{where}: got {brief(value)}, expected {expected}")
    return _read(where, lambda: list(islice(value, most + 1)), most, raises, expected)


def as_dict(where: str, value: object, most: int, *, raises: type[OmniError], expected: str) -> dict[Any, Any]:
    """The items of a mapping, at most so many of them."""
    if not isinstance(value, Mapping):
        raise raises(f"{where}: got {brief(value)}, expected {expected}")
    return dict(_read(where, lambda: [(key, value[key]) for key in islice(value, most + 1)], most, raises, expected))


def is_array(value: object) -> bool:
    """Whether a value is of numpy or torch; imports neither."""
    return type(value).__module__.partition(".")[0] in ARRAY_PACKAGES


def _read(where: str, read: Callable[[], list[T]], most: int, raises: type[OmniError], expected: str) -> list[T]:
    try:
        items = read()
    except Exception as error:
        raise raises(f"{where}: cannot be read ({type(error).__name__}), expected {expected}") from error
    if len(items) > most:
        raise raises(f"{where}: got more than {most}, expected {expected}, at most {most}")
    return items


def as_json(
    where: str, value: object, *, raises: type[OmniError], max_values: int = 100_000, max_depth: int = 64
) -> Any:
    """A copy made of dict, list, str, int, float, bool and None alone, of mappings, sequences and the numbers of numpy
    and torch; at most so many values and levels of them. Strings are as long as they are: whoever has a limit for them
    counts them (`num_json_chars`).
    """
    count = 0

    def copy(where: str, value: object, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > max_values or depth > max_depth:
            most = f"{max_values} values" if count > max_values else f"{max_depth} levels"
            raise raises(f"{where}: got too much, expected at most {most}")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, Mapping):
            given = as_dict(where, value, max_values - count, raises=raises, expected="a mapping")
            named = [(_name(where, key, raises), item) for key, item in given.items()]
            return {name: copy(f"{where}.{name[:80]}", item, depth + 1) for name, item in named}
        if is_array(value) and getattr(value, "shape", None) == ():
            return copy(where, value.item(), depth)  # type: ignore[attr-defined]
        if is_array(value) or (isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray))):
            items = as_list(where, value, max_values - count, raises=raises, expected="a list")
            return [copy(f"{where}[{index}]", item, depth + 1) for index, item in enumerate(items)]
        if not isinstance(value, (int, float)):
            raise raises(f"{where}: got {brief(value)}, expected a plain value")
        return as_number(where, value, -MAX_JSON_NUMBER, MAX_JSON_NUMBER, raises=raises)

    return copy(where, value, 1)


def num_json_chars(value: object) -> int:
    """Characters of all keys and strings in a value of `as_json`."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + num_json_chars(item) for key, item in value.items())
    return sum(map(num_json_chars, value)) if isinstance(value, list) else 0


def _name(where: str, key: object, raises: type[OmniError]) -> str:
    if not isinstance(key, str):
        raise raises(f"{where}: got the key {brief(key)}, expected a string")
    return str.__str__(key)
