"""What config files and stages say of rotary positions: the keys of transformers' `rope_parameters`, checked, and how
many positions they give. Computes no frequencies and knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number, did_you_mean, number_complaint

MAX_FACTOR = 1024.0
ORIGINAL = "original_max_position_embeddings"
COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta"})
# type -> the keys that scale; what else a file holds (theta, sections of axes) is kept when a stage scales otherwise
SCALING_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor", ORIGINAL}),
    "dynamic": frozenset({"factor", ORIGINAL}),
    "yarn": frozenset(
        {"factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    ),
    "llama3": frozenset({"factor", ORIGINAL, "low_freq_factor", "high_freq_factor"}),
    "longrope": frozenset({"factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"}),
}
ROPE_TYPES = tuple(SCALING_KEYS)
SCALED_BY_LENGTH = ("dynamic", "longrope")  # types whose frequencies change with the length of a sequence
WITH_ORIGINAL = ("yarn", "llama3", "longrope")  # types that are computed from the length before scaling
_LISTS = ("short_factor", "long_factor")
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": _LISTS,
}


def read_rope(raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `rope_parameters` from a config.json of any age, as transformers reads it: `rope_scaling` stands
    above `rope_parameters`. `rope_type` and `rope_theta` are always among them.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    own = raw.get(key) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"{where}: {key}: got {brief(own)}, expected an object")
    if any(isinstance(value, Mapping) for value in own.values()):
        raise ConfigError(f"{where}: {key}: got {brief(own)}, expected the same rotary positions for all layers")
    rope = {**defaults, "rope_theta": raw.get("rope_theta", defaults["rope_theta"]), **own}
    old_type = rope.pop("type", "default")
    rope["rope_type"] = rope.get("rope_type", old_type)
    if rope["rope_type"] == "mrope":  # what files of early versions call the default one with sections
        rope["rope_type"] = "default"
    if rope["rope_type"] in WITH_ORIGINAL and raw.get(ORIGINAL) is not None:
        rope[ORIGINAL] = raw[ORIGINAL]
    check_rope(rope, f"{where}: {key}")
    return rope


def override_rope(rope: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`rope` with another scaling, as a stage's `rope_scaling` says it. What does not scale is kept, and so is the
    length before scaling, where the file has one.
    """
    where = "rope_scaling"
    rope_type = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ConfigError(f"{where}.rope_type: got {brief(rope_type)}, expected one of {', '.join(ROPE_TYPES)}")
    known = SCALING_KEYS[rope_type] | COMMON_KEYS
    for key in scaling:
        if key not in known:
            raise ConfigError(f"{where}: got {brief(key)}{did_you_mean(str(key), known)}")
    every_key = frozenset().union(*SCALING_KEYS.values())
    kept = {key: value for key, value in rope.items() if key not in every_key}
    if rope_type in WITH_ORIGINAL and ORIGINAL in rope:
        kept[ORIGINAL] = rope[ORIGINAL]
    changed = {**kept, **{key: value for key, value in scaling.items() if key != "type"}, "rope_type": rope_type}
    check_rope(changed, where)
    return changed


def num_positions(rope: Mapping[str, Any], max_positions: int) -> int:
    """How many positions a sequence may have, max_positions being the config's `max_position_embeddings`.

    A factor extends the length before scaling. The files of llama3 and longrope name the extended one themselves, where
    it is not the length before scaling.
    """
    factor = rope.get("factor")
    original = original_positions(rope, max_positions)
    if rope["rope_type"] == "default" or factor is None:
        return max_positions
    if rope["rope_type"] in ("llama3", "longrope") and original < max_positions:
        return max_positions
    return max(max_positions, int(original * factor))


def original_positions(rope: Mapping[str, Any], max_positions: int) -> int:
    """The length before scaling."""
    return int(rope.get(ORIGINAL) or max_positions)


def scaled_beyond(rope: Mapping[str, Any], max_positions: int) -> int | None:
    """The length of a sequence from which on its frequencies depend on it; None where they never do."""
    if rope["rope_type"] == "dynamic":
        return max_positions
    return original_positions(rope, max_positions) if rope["rope_type"] == "longrope" else None


def check_rope(rope: Mapping[str, Any], where: str) -> None:
    """ConfigError for a type that is not known, and for numbers that no frequencies could be made of."""
    rope_type = rope["rope_type"]
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ConfigError(f"{where}.rope_type: got {brief(rope_type)}, expected one of {', '.join(ROPE_TYPES)}")
    check_number(f"{where}.rope_theta", rope["rope_theta"], 0, above_low=True, raises=ConfigError)
    partial = rope.get("partial_rotary_factor")
    if partial not in (1, None):
        raise ConfigError(f"{where}.partial_rotary_factor: got {brief(partial)}, expected 1; nothing else is supported")
    if rope_type in SCALED_BY_LENGTH and rope.get("mrope_section") is not None:
        raise ConfigError(
            f"{where}.rope_type: got {rope_type!r}, expected default, linear, yarn or llama3 for positions of three "
            "axes (mrope_section)"
        )
    for key in sorted(SCALING_KEYS[rope_type] - {"truncate"}):
        if rope.get(key) is not None or key in _REQUIRED.get(rope_type, ()):
            _check_value(key, rope.get(key), f"{where}.{key}")


def _check_value(key: str, value: object, where: str) -> None:
    if key in _LISTS:
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [None]
        if any(number_complaint("", item, 0, above_low=True) for item in items):
            raise ConfigError(
                f"{where}: got {brief(value)}, expected a list of numbers above 0, one for each frequency"
            )
    elif key == "factor":
        check_number(where, value, 1, MAX_FACTOR, raises=ConfigError)
    elif key == ORIGINAL:
        check_number(where, value, 1, integer=True, raises=ConfigError)
    else:
        check_number(where, value, 0, above_low=True, raises=ConfigError)
