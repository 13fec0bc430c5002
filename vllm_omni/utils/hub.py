"""Downloads from the Hugging Face hub: what a repository needs, its weights in one variant, nothing twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError

SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "spk_dict.pt"]
WEIGHTS = "*.safetensors"
VARIANTS = "*.*.safetensors"  # model.fp16.safetensors, beside model.safetensors
USUAL_VARIANTS = ("fp16", "bf16")  # in the order in which they are taken where there are no plain weights


def download(repository: str, revision: str | None, variant: str | None) -> Path:
    """The repository's folder in the local cache. Of a pipeline the weights of its parts alone, not the single-file
    checkpoints beside its index; the variant that is asked for, else the plain weights, else the only ones there are.
    ConfigError where it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    def fetch(patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored) or None
            )
        )

    try:
        folder = fetch(SMALL_FILES)
        if not (folder / "model_index.json").is_file():
            return folder if any(folder.rglob(WEIGHTS)) else fetch([*SMALL_FILES, WEIGHTS])
        for wanted in (variant, None, *USUAL_VARIANTS) if variant is not None else (None, *USUAL_VARIANTS):
            missing = _parts_without_weights(folder)
            if not missing:
                break
            if wanted is None:
                fetch([f"{part}/{WEIGHTS}" for part in missing], [VARIANTS])
            else:
                fetch([f"{part}/*.{wanted}{rest}" for part in missing for rest in (".safetensors", "-*.safetensors")])
        return folder
    except Exception as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        raise ConfigError(
            f"model: {repository!r} is no local folder and could not be fetched from the hub{at}: {error}"
        ) from error


def _parts_without_weights(folder: Path) -> list[str]:
    """The models among a pipeline's parts (schedulers and tokenizers have no config.json) that have no weights yet."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")]
    models = [part for part in parts if (folder / part / "config.json").is_file()]
    return [part for part in models if not any((folder / part).glob(WEIGHTS))]
