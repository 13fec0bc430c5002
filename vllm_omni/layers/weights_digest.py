"""A digest of a checkpoint: which weights and which configuration its folders hold, without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vllm_omni.layers.weights import tensor_files
from vllm_omni.utils.checkpoint_files import MAX_JSON_BYTES, read_bytes

EDGE_BYTES = 2**20  # that are read at the beginning (names, shapes, first numbers) and at the end of each weight file


def weights_digest(folder: Path, weight_folders: Iterable[Path], variant: str | None) -> str:
    """Of the configuration files of a folder and of the folders within it, and of size, beginning and end of every
    weight file: other names, shapes or numbers make another digest, another place on the disk does not.
    """
    digest = hashlib.sha256()
    for file in sorted({*folder.glob("*config.json"), *folder.glob("*/*config.json")}):
        digest.update(f"{file.relative_to(folder)}\0".encode() + read_bytes(file, MAX_JSON_BYTES))
    for part in weight_folders:
        for file in sorted(set(tensor_files(part, variant=variant).values())):
            digest.update(f"{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                digest.update(content.read(EDGE_BYTES))
                content.seek(max(file.stat().st_size - EDGE_BYTES, 0))
                digest.update(content.read(EDGE_BYTES))
    return digest.hexdigest()
