"""Names of weight files: which variant (fp16, bf16) of a model's weights a file belongs to, as the hub writes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors, and their index
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
USUAL_VARIANTS = ("fp16", "bf16")  # in the order in which they are taken where there are no plain weights
_WEIGHTS = re.compile(r"[^.]+(?:\.([A-Za-z0-9_]+))?\.safetensors(?:\.index(?:\.([A-Za-z0-9_]+))?\.json)?")


def variant_of(file_name: str) -> str | None:
    """None for plain weights; ValueError for a file that holds no weights."""
    match = _WEIGHTS.fullmatch(_SHARD.sub("", file_name))
    if match is None:
        raise ValueError(f"{file_name}: no safetensors file")
    return match.group(1) or match.group(2)


def is_weights(file_name: str) -> bool:
    return _WEIGHTS.fullmatch(_SHARD.sub("", file_name)) is not None


def variants_of(file_names: Iterable[str]) -> set[str | None]:
    """Of all weight files among them; None stands for plain ones."""
    return {variant_of(name) for name in file_names if is_weights(name)}


def taken_variant(variants: Collection[str | None]) -> str | None:
    """Of those that there are the plain ones (None), else the first of the usual, else the first by name."""
    if None in variants:
        return None
    named = sorted(variant for variant in variants if variant is not None)
    return next((variant for variant in (*USUAL_VARIANTS, *named) if variant in named), None)


def of_one_variant(file_names: Sequence[str]) -> list[str]:
    """Without the files of a usual variant where those of another one, or plain ones, are taken."""
    found = variants_of(file_names)
    others = found.intersection(USUAL_VARIANTS) - {taken_variant(found)}
    return [name for name in file_names if not is_weights(name) or variant_of(name) not in others]
