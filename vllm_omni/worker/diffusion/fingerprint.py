"""What tells a model from every other one, so that numbers that were fitted on one are never used with another: its
published configuration, and a few rows of its weights, since models of one shape share a configuration.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vllm_omni.layers.weights import load_rows, tensor_shapes
from vllm_omni.utils.files import read_json

NUM_TENSORS = 4  # of whose matrices a row is read
NUM_DIGITS = 16


def fingerprint(folder: Path, weights_variant: str | None = None) -> str:
    """Of a folder with `config.json` and safetensors files: 16 hexadecimal digits. Other weight files (shards, a dtype)
    of the same model may give another one. weights_variant: which files are loaded.
    """
    published = read_json(folder / "config.json")
    config = {key: value for key, value in published.items() if not key.startswith("_")}  # who saved it, and where
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    shapes = tensor_shapes(folder, variant=weights_variant)
    matrices = sorted(name for name, shape in shapes.items() if len(shape) == 2)
    for name in matrices[:: max(1, len(matrices) // NUM_TENSORS)][:NUM_TENSORS]:
        row = load_rows(folder, name, [0], shapes[name][1], weights_variant)
        digest.update(name.encode() + row.float().numpy().tobytes())
    return digest.hexdigest()[:NUM_DIGITS]
