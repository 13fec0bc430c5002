"""Which folder, options and model class a `dit` stage has."""

from __future__ import annotations

from pathlib import Path

from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.diffusion.options import DiTOptions
from vllm_omni.errors import ConfigError
from vllm_omni.registry import names, resolve
from vllm_omni.utils.checks import did_you_mean
from vllm_omni.utils.files import read_json, resolve_model_folder
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel

PIPELINE_INDEX = "model_index.json"
CHECKPOINT_CONFIG = "config.json"


def folder_of(stage: StageConfig) -> Path:
    if stage.model is None:
        raise ConfigError(
            f"stages.{stage.name}.model: missing; expected a diffusers pipeline folder, or a transformers folder"
            " beside the key 'part'"
        )
    return resolve_model_folder(stage.model)


def options_of(stage: StageConfig) -> DiTOptions:
    options = stage.options if stage.options is not None else DiTOptions()
    if not isinstance(options, DiTOptions):
        raise ConfigError(f"stages.{stage.name}: got options of type {type(options).__name__}, expected DiTOptions")
    return options


def model_class_of(stage: StageConfig, folder: Path) -> type[DiffusionModel]:
    """By the class name of a pipeline's index, else by a checkpoint's architecture and the stage's `part`."""
    part, where = options_of(stage).part, f"stages.{stage.name}.part"
    is_checkpoint = (folder / CHECKPOINT_CONFIG).is_file() and not (folder / PIPELINE_INDEX).is_file()
    if not is_checkpoint:
        if part is not None:
            raise ConfigError(f"{where}: got {part!r}, but {folder} holds one diffusers pipeline; leave it out")
        return _resolved(str(read_json(folder / PIPELINE_INDEX).get("_class_name")))
    architectures = read_json(folder / CHECKPOINT_CONFIG).get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else "None"
    parts = [name.partition(".")[2] for name in names("diffusion model") if name.startswith(architecture + ".")]
    if not parts:
        raise ConfigError(f"{folder / CHECKPOINT_CONFIG}: architectures: got {architecture!r}, which diffuses nothing")
    if part is None:
        raise ConfigError(f"{where}: missing; {architecture} holds several models; expected one of {', '.join(parts)}")
    if part not in parts:
        raise ConfigError(f"{where}: got {part!r}{did_you_mean(part, parts)}")
    return _resolved(f"{architecture}.{part}")


def _resolved(name: str) -> type[DiffusionModel]:
    model_class: type[DiffusionModel] = resolve("diffusion model", name)
    return model_class
