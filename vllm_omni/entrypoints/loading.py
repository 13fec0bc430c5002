"""From what a caller names (a config, a checkpoint, overrides) to a loaded OmniExecutor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import OmniConfig
from vllm_omni.config.shipped import config_for_model
from vllm_omni.errors import ConfigError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.files import resolve_model_folder

ConfigLike = str | Path | Mapping[str, Any] | OmniConfig


def resolve_config(
    config: ConfigLike | None = None,
    *,
    model: str | None = None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
) -> OmniConfig:
    """The configuration: of a file, a shipped name, a mapping, or the shipped one that fits the checkpoint `model`.

    device, dtype: for every stage, whatever the config says. Raises ConfigError.
    """
    if isinstance(config, OmniConfig):
        if model is not None or overrides:
            raise ConfigError("config: got an OmniConfig with model or overrides; dataclasses.replace() it instead")
        loaded = config
    elif config is None and model is None:
        raise ConfigError(
            "config: got neither a config nor a model; pass Omni(config='x.yaml') or Omni(model='folder')"
        )
    elif config is None:
        folder = resolve_model_folder(str(model), _given_revision(overrides))
        loaded = load_config(config_for_model(folder), overrides, str(folder))
    else:
        loaded = load_config(config, overrides, model)
    placed: dict[str, Any] = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
    if not placed:
        return loaded
    stages = {name: dataclasses.replace(stage, **placed) for name, stage in loaded.stages.items()}
    return dataclasses.replace(loaded, stages=stages)


def _given_revision(overrides: Sequence[str]) -> str | None:
    """The revision of the hub that is looked into for the fitting config, too."""
    given = [text for key, equals, text in (item.partition("=") for item in overrides) if key.strip() == "revision"]
    return given[-1] if given else None


def load_executor(config: OmniConfig) -> OmniExecutor:
    """Every stage loaded; ConfigError, CheckpointError or ResourceError when that cannot be."""
    return OmniExecutor(Pipeline(config))
