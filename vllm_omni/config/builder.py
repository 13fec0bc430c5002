"""Plain values (from YAML or JSON) into typed, frozen dataclasses. Knows types and key paths, no file and no stage.

Strict: an int may stand for a float, nothing else is converted. Complaints are ConfigErrors: "key: got, expected".
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.utils.checks import brief, did_you_mean, is_finite

T = TypeVar("T")

_MAPPINGS = (Mapping, dict)
_LISTS = (Sequence, list, tuple, frozenset)
_SCALAR_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    type(None): "null",
}


def build(cls: type[T], value: object, key: str = "") -> T:
    """An instance of the dataclass `cls`; `key` is where `value` stands, for messages."""
    known = fields_by_key(cls)
    given = _checked_mapping(value, key, f"a group of keys ({', '.join(known)})")
    for name in given:
        check_known(name, known, key)
    for name, field in known.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and name not in given:
            raise ConfigError(f"{join(key, name)}: missing; it is required")
    hints = get_type_hints(cls)
    converted = {
        known[name].name: convert(hints[known[name].name], item, join(key, name)) for name, item in given.items()
    }
    return construct(cls, converted, key)


def construct(cls: type[T], fields: Mapping[str, Any], key: str) -> T:
    """`cls(**fields)`, with the key path in front of what its own checks complain about."""
    try:
        return cls(**fields)
    except (ConfigError, InvalidRequestError) as error:
        raise ConfigError(under(key, str(error), fields_by_key(cls))) from error


def fields_by_key(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """YAML key -> field. A key equals its field, but for words that Python keeps for itself (metadata "key")."""
    return {f.metadata.get("key", f.name): f for f in dataclasses.fields(cast(Any, cls)) if f.init}


def under(key: str, complaint: str, known: Collection[str]) -> str:
    """A complaint of what stands at `key`, which knows only its own fields, for a reader of the whole config."""
    first_word = re.match(r"\w*", complaint)
    names_field = first_word is not None and first_word.group() in known
    return join(key, complaint) if names_field else f"{key}: {complaint}"


def check_known(name: object, known: Collection[str], key: str) -> None:
    """Raises for a key that nobody reads."""
    if name not in known:
        raise ConfigError(f"{join(key, str(name))}: unknown key{did_you_mean(str(name), known)}")


def join(key: str, name: str) -> str:
    """One step down the key path."""
    return f"{key}.{name}" if key else name


def convert(hint: Any, value: object, key: str) -> Any:
    """`value` as the annotation `hint` wants it: dataclasses, Literal, Optional, unions, tuples, lists, mappings."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(cast(type, hint), value, key)
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return _union(hint, value, key)
    if origin in _MAPPINGS:
        return _mapping(hint, value, key)
    if origin in _LISTS:
        return _list(hint, value, key)
    if origin is Literal:
        return _choice({choice: choice for choice in get_args(hint)}, value, key)
    if issubclass(origin, enum.Enum):
        return _choice({member.value: member for member in origin}, value, key)
    return _scalar(origin, value, key)


def _union(hint: Any, value: object, key: str) -> Any:
    members = get_args(hint)
    if value is None and type(None) in members:
        return None
    fitting = [member for member in members if member is not type(None) and _shape(member) == _value_shape(value)]
    if len(fitting) == 1:
        return convert(fitting[0], value, key)
    for member in fitting:
        try:
            return convert(member, value, key)
        except ConfigError:
            continue
    raise _complaint(key, value, _words(hint))


def _mapping(hint: Any, value: object, key: str) -> dict[Any, Any]:
    key_hint, item_hint = get_args(hint) or (Any, Any)
    items = _checked_mapping(value, key, _words(hint))
    return {
        convert(key_hint, name, f"{join(key, str(name))} (the key)"): convert(item_hint, item, join(key, str(name)))
        for name, item in items.items()
    }


def _list(hint: Any, value: object, key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _complaint(key, value, _words(hint))
    arguments = get_args(hint) or (Any, ...)
    is_fixed = get_origin(hint) is tuple and arguments[-1] is not ...
    if is_fixed and len(value) != len(arguments):
        raise _complaint(key, value, f"a list of {len(arguments)}")
    hints = arguments if is_fixed else [arguments[0]] * len(value)
    items = [
        convert(item_hint, item, f"{key}[{i}]") for i, (item_hint, item) in enumerate(zip(hints, value, strict=True))
    ]
    return frozenset(items) if (get_origin(hint) or hint) is frozenset else tuple(items)


def _choice(choices: Mapping[Any, T], value: object, key: str) -> T:
    for choice, member in choices.items():
        if choice == value and type(choice) is type(value):
            return member
    near = did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""
    hint = near if near.startswith(" (did") else ""
    raise _complaint(key, value, f"one of {', '.join(map(repr, choices))}{hint}")


def _scalar(hint: type, value: object, key: str) -> Any:
    if hint not in _SCALAR_WORDS:
        raise TypeError(f"{key}: the annotation {hint!r} cannot be filled from YAML")
    if hint is float and type(value) in (int, float) and is_finite(value):
        return float(cast(float, value))
    if hint is not float and type(value) is hint:
        return value
    raise _complaint(key, value, _SCALAR_WORDS[hint])


def _checked_mapping(value: object, key: str, expected: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise _complaint(key, value, expected)
    return value


def _complaint(key: str, value: object, expected: str) -> ConfigError:
    got = "null" if value is None else brief(value)
    return ConfigError(f"{key + ': ' if key else ''}got {got}, expected {expected}")


def _shape(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if dataclasses.is_dataclass(hint) or origin in _MAPPINGS:
        return "mapping"
    return "list" if origin in _LISTS else "scalar"


def _value_shape(value: object) -> str:
    if isinstance(value, Mapping):
        return "mapping"
    return "list" if isinstance(value, (list, tuple)) else "scalar"


def _words(hint: Any) -> str:
    """What an annotation expects, for a reader who knows YAML and no Python."""
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return " or ".join(_words(member) for member in get_args(hint))
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if origin in _SCALAR_WORDS:
        return _SCALAR_WORDS[origin]
    return {"mapping": "a mapping", "list": "a list", "scalar": "a value"}[_shape(hint)]
