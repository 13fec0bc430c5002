"""From what a caller names (a config, a checkpoint, overrides) to a Pipeline, and on to a loaded OmniExecutor."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import PROCESS, OmniConfig
from vllm_omni.config.shipped import config_for_model
from vllm_omni.entrypoints.garbage import while_loading
from vllm_omni.errors import ConfigError
from vllm_omni.executor.homes import is_forked, is_on_cpu
from vllm_omni.executor.loading_step import OnLoading
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.children.fork_client import prepare_children
from vllm_omni.utils.files import ModelFolders

logger = logging.getLogger(__name__)

SHARED_PROCESS = "models"  # the name of what `set_apart` makes
ConfigLike = str | Path | Mapping[str, Any] | OmniConfig


def open_pipeline(
    config: ConfigLike | Pipeline | None = None,
    *,
    model: str | None = None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    headers_only: bool = False,
    apart: bool = False,
) -> Pipeline:
    """What runs: of a file, a shipped name, a mapping, or the shipped config that fits the checkpoint `model`. Every
    folder is looked up once.

    device, dtype: for every stage, whatever the config says. headers_only: where nothing will be loaded, so that no
    weights need to be fetched. apart: see `set_apart`. Raises ConfigError.
    """
    if isinstance(config, Pipeline):
        if model is not None or overrides or device is not None or dtype is not None:
            raise ConfigError("config: got a Pipeline with model, overrides, device or dtype; open it with them")
        return config
    folders = ModelFolders(headers_only=headers_only)
    loaded = _resolve_config(config, model, overrides, folders)
    placed: dict[str, Any] = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
    if placed:
        stages = {name: dataclasses.replace(stage, **placed) for name, stage in loaded.stages.items()}
        loaded = dataclasses.replace(loaded, stages=stages)
    return Pipeline(set_apart(loaded) if apart else loaded, folders)


def set_apart(config: OmniConfig) -> OmniConfig:
    """Stages that do not say where they run share a process of their own, apart from whoever answers callers: neither
    waits for the other's Python, and a crash of the one leaves the other. Only where all compute on the CPU.
    """
    stages = config.stages.values()
    if not all(is_on_cpu(stage) for stage in stages):
        return config
    moved = {
        stage.name: dataclasses.replace(stage, executor=PROCESS, process=SHARED_PROCESS)
        for stage in stages
        if stage.executor == "auto" and stage.replicas == 1
    }
    return dataclasses.replace(config, stages={**config.stages, **moved})


def prepare_stages(pipelines: Iterable[Pipeline]) -> None:
    """Has imported what stages in forked processes take from large libraries, ahead of them: this process goes on."""
    forked = [
        spec
        for pipeline in pipelines
        for spec in pipeline.specs.values()
        if is_forked(spec.stage, pipeline.config.stages.values())
    ]
    if forked:
        prepare_children([name for spec in forked for name in spec.imports])


def load_executor(pipeline: Pipeline, on_loading: OnLoading | None = None) -> OmniExecutor:
    """Every stage loaded; CheckpointError or ResourceError when that cannot be. on_loading: is called before each."""
    with while_loading:
        return OmniExecutor(pipeline, on_loading=on_loading)


def _resolve_config(
    config: ConfigLike | None, model: str | None, overrides: Sequence[str], folders: ModelFolders
) -> OmniConfig:
    if isinstance(config, OmniConfig):
        if model is not None or overrides:
            raise ConfigError("config: got an OmniConfig with model or overrides; dataclasses.replace() it instead")
        return config
    if config is not None:
        return load_config(config, overrides, model)
    if model is None:
        raise ConfigError(
            "config: got neither a config nor a model; pass Omni(config='x.yaml') or Omni(model='folder')"
        )
    folder = folders.resolve(str(model), _given_revision(overrides))
    chosen = config_for_model(folder)
    logger.info("%s: runs with the shipped config %s", model, chosen.stem)
    return load_config(chosen, overrides, str(folder))


def _given_revision(overrides: Sequence[str]) -> str | None:
    """The revision of the hub that is looked into for the fitting config, too."""
    given = [text for key, equals, text in (item.partition("=") for item in overrides) if key.strip() == "revision"]
    return given[-1] if given else None
