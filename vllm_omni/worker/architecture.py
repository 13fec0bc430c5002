"""Which model of transformers a config.json means: its `architectures`, else what transformers loads for its
`model_type`. Knows what the registry has, no model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_omni import registry
from vllm_omni.errors import ConfigError
from vllm_omni.layers.weights import tensor_files
from vllm_omni.utils.checks import brief

HEAD = "lm_head.weight"


def named_architectures(raw: Mapping[str, Any], where: str) -> list[str]:
    """`architectures`, or the one that transformers loads for the `model_type`; empty where neither says any."""
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: architectures: got {brief(names)}, expected a list of names")
    if names:
        return names
    model_type = raw.get("model_type")
    found = _heads_by_type().get(model_type) if isinstance(model_type, str) else None
    return [] if found is None else [found]


def language_architecture(raw: Mapping[str, Any], where: str, folder: Path | None = None) -> str:
    """The architecture of a language model that the registry has; ConfigError where there is none. folder: whose
    weights tell a model without a head, where nothing else does.
    """
    names = named_architectures(raw, where)
    known = {row.partition(".")[0] for row in registry.names("language model")}
    found = next((name for name in names if name in known), None)
    if found is None:
        got = brief(names[0] if len(names) == 1 else names) if names else "none"
        raise ConfigError(
            f"{where}: architectures: got {got} (model_type {brief(raw.get('model_type'))}), expected one of "
            f"{', '.join(sorted(known))}; choose a checkpoint of one of these, or register a model of your own"
        )
    if folder is not None and not raw.get("architectures") and not raw.get("tie_word_embeddings"):
        base = _bases_by_type().get(str(raw.get("model_type")))
        if base in known and not any(name.endswith(HEAD) for name in tensor_files(folder)):
            return str(base)
    return found


def _heads_by_type() -> Mapping[str, Any]:
    from transformers.models.auto import modeling_auto

    return {
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }


def _bases_by_type() -> Mapping[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return MODEL_MAPPING_NAMES
