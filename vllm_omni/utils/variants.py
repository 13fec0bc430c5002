"""Names of weight files: which variant (fp16, bf16) of a model's weights a file belongs to, as the hub writes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief

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


def variants_in(folder: Path) -> set[str | None]:
    """Of the weight files of a folder; none where there is no such folder."""
    return variants_of([file.name for file in folder.iterdir()]) if folder.is_dir() else set()


def serving_variants(parts: Mapping[str, Collection[str | None]]) -> list[str]:
    """Those that serve a whole model, by name: every part has its weights in them, or plain ones. parts: the variants
    that each has.
    """
    known = sorted({variant for variants in parts.values() for variant in variants if variant is not None})
    return [name for name in known if all(name in variants or None in variants for variants in parts.values())]


def check_variant(asked: str, parts: Mapping[str, Collection[str | None]], folder: Path) -> None:
    """ConfigError for one that does not serve all parts of the folder's model."""
    if asked not in serving_variants(parts):
        raise ConfigError(f"variant: got {brief(asked)}, but {folder} has {said_variants(parts, asked)}")


def said_variants(parts: Mapping[str, Collection[str | None]], asked: str | None = None) -> str:
    """Which variants there are and, where the one that is asked for is among them, which parts have others alone."""
    known = sorted({variant for variants in parts.values() for variant in variants if variant is not None})
    if asked is not None and asked not in known:
        return ", ".join(known) or "no variant"
    others = {part: variants for part, variants in parts.items() if None not in variants and asked not in variants}
    return ", ".join(
        f"{' and '.join(sorted(filter(None, variants)))} alone of {part}" for part, variants in others.items()
    )


def of_one_variant(file_names: Sequence[str]) -> list[str]:
    """Without the files of a usual variant where those of another one, or plain ones, are taken."""
    found = variants_of(file_names)
    others = found.intersection(USUAL_VARIANTS) - {taken_variant(found)}
    return [name for name in file_names if not is_weights(name) or variant_of(name) not in others]
