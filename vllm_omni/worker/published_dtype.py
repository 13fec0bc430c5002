"""What a checkpoint was published in: what its config.json says, or the headers of its safetensors files. Reads no
weights, and decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_omni.layers.weights import tensor_files
from vllm_omni.utils.checkpoint_files import check_file, reading

BY_NAME = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BY_HEADER = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def dtype_of_config(raw: Mapping[str, Any], part: str | None = None) -> torch.dtype | None:
    """What a config.json of transformers says: of the whole, else of the part, else of either's language model. None
    for nothing, and for what is no such dtype ("auto", a quantised one).
    """
    levels = [raw, _section(raw, f"{part}_config")]
    levels += [_section(level, "text_config") for level in levels]
    for level in levels:
        for key in ("dtype", "torch_dtype"):
            said = level.get(key)
            if isinstance(said, str) and said.removeprefix("torch.") in BY_NAME:
                return BY_NAME[said.removeprefix("torch.")]
    return None


def dtype_of_folders(folders: Iterable[Path], variant: str | None = None) -> torch.dtype | None:
    """As `dtype_of_headers`, of all weights of these folders, chosen as `tensor_files` does."""
    return dtype_of_headers(file for folder in folders for file in tensor_files(folder, variant=variant).values())


def dtype_of_headers(files: Iterable[Path], prefix: str = "", left_out: tuple[str, ...] = ()) -> torch.dtype | None:
    """The one that holds most numbers, of equally many the wider one; None where none is of floating point. Of the
    tensors whose names begin with the prefix, and not with what is left out.
    """
    counts: Counter[torch.dtype] = Counter()
    for stored, shape in _stored(files, prefix, left_out):
        if stored in BY_HEADER:
            counts[BY_HEADER[stored]] += math.prod(shape)
    return max(counts, key=lambda dtype: (counts[dtype], dtype.itemsize), default=None)


def dtypes_of_matrices(
    files: Iterable[Path], prefix: str = "", left_out: tuple[str, ...] = ()
) -> set[torch.dtype | None]:
    """All that tensors of two dimensions or more are stored in, chosen as `dtype_of_headers` does; None for others."""
    return {BY_HEADER.get(stored) for stored, shape in _stored(files, prefix, left_out) if len(shape) >= 2}


def _stored(files: Iterable[Path], prefix: str, left_out: tuple[str, ...]) -> Iterator[tuple[str, Sequence[int]]]:
    """What the headers say of each tensor: the name of its dtype, and its shape."""
    for file in set(files):
        check_file(file)
        with reading(str(file)), safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                if name.startswith(prefix) and not name.startswith(left_out):
                    tensor = handle.get_slice(name)
                    yield tensor.get_dtype(), tensor.get_shape()


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = raw.get(key)
    return found if isinstance(found, Mapping) else {}
