"""The alpha of a LoRA's layers where its tensors do not say it: in the file's metadata, or in a JSON file beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_omni.errors import CheckpointError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json

METADATA_KEY = "lora_adapter_metadata"  # as diffusers writes it: a PEFT config as JSON
METADATA_PREFIX = "transformer."
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_ALPHA = 1e6
MAX_METADATA_CHARS = 2**20
PLAIN_NAME = re.compile(r"\^?[\w.]+")
# keys of a PEFT config -> the values with which it is a plain LoRA
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
}


@dataclass(frozen=True, slots=True)
class Scaling:
    """alpha: of layers that have none of their own; None: their rank, so that the factor is 1."""

    alpha: float | None = None
    by_layer: Mapping[str, float] = field(default_factory=dict)  # name, or its end behind a dot -> alpha
    by_root: bool = False  # alpha / sqrt(rank), as rank-stabilised LoRA has it

    def factor(self, layer: str, rank: int, own: float | None) -> float:
        """own: the alpha that stands among the tensors."""
        alpha = own if own is not None else self._alpha_of(layer)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root else rank)

    def _alpha_of(self, layer: str) -> float | None:
        for name, alpha in self.by_layer.items():
            exact = name.removeprefix("^")
            if layer == exact or (exact == name and layer.endswith(f".{name}")):
                return alpha
        return self.alpha

    @classmethod
    def of_config(cls, config: Mapping[str, Any], where: str) -> Scaling:
        """A PEFT config; CheckpointError for what is no plain LoRA."""
        for key, values in PLAIN.items():
            if config.get(key) not in values:
                raise CheckpointError(f"{where}: {key}: got {brief(config[key])}, expected {brief(values[0])}")
        alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{where}: alpha_pattern: got {brief(patterns)}, expected alphas by layer")
        for name, value in [("lora_alpha", alpha), *((str(name), value) for name, value in patterns.items())]:
            if value is not None or name != "lora_alpha":
                check_number(f"{where}: {name:.80}", value, 0, MAX_ALPHA, raises=CheckpointError)
            if not PLAIN_NAME.fullmatch(name):
                raise CheckpointError(f"{where}: alpha_pattern: got {brief(name)}, expected the name of a layer")
        by_layer = {str(name): float(value) for name, value in patterns.items()}
        return cls(None if alpha is None else float(alpha), by_layer, bool(config.get("use_rslora")))


def read_scaling(file: Path, metadata: Mapping[str, str] | None) -> Scaling | None:
    """None where nothing says."""
    config = _config_beside(file)
    if config is not None:
        return Scaling.of_config(read_json(config), str(config))
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        return None
    where = f"{file}: {METADATA_KEY}"
    try:
        given = json.loads(text) if len(text) <= MAX_METADATA_CHARS else None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise CheckpointError(f"{where}: got {brief(text)}, expected a JSON object")
    return Scaling.of_config({str(key).removeprefix(METADATA_PREFIX): value for key, value in given.items()}, where)


def _config_beside(file: Path) -> Path | None:
    named = file.with_suffix(".json")
    if named.is_file():
        return named
    config = file.with_name(PEFT_CONFIG)
    return config if file.name == PEFT_FILE and config.is_file() else None
