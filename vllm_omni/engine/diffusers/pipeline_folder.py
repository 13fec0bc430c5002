"""A diffusers pipeline folder that is hosted as it is: what may be loaded from it, and loading it.

Only classes of diffusers and transformers are loaded, only from safetensors files; code in the folder is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import weights_bytes
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.files import read_json

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
# where published pipelines keep their sample rate, as (component, key of its config)
SAMPLE_RATES = (
    ("vae", "sampling_rate"),
    ("vocoder", "sampling_rate"),
    ("vae", "sample_rate"),
    ("unet", "sample_rate"),
    ("mel", "sample_rate"),
)


def pipeline_name(folder: Path, chosen: str | None) -> str:
    """The class that runs the folder: `chosen`, else that of its index; ConfigError unless diffusers exports it.

    Imports no pipeline: the name alone is looked up.
    """
    import diffusers

    named = read_json(folder / INDEX).get("_class_name")
    name = named if chosen is None else chosen
    where = f"{folder / INDEX}: _class_name" if chosen is None else "pipeline"
    if not isinstance(name, str):
        raise ConfigError(f"{where}: got {brief(name)}, expected the name of a pipeline class; custom code is not run")
    known = [entry for entry in dir(diffusers) if entry.endswith("Pipeline") and entry != "DiffusionPipeline"]
    if name not in known:
        near = did_you_mean(name, known)
        hint = near if near.startswith(" (did") else ""
        raise ConfigError(f"{where}: got {name!r}, expected a pipeline class that diffusers exports{hint}")
    return name


def component_folders(folder: Path) -> list[Path]:
    """The parts of a pipeline folder that hold weights; ConfigError for what could bring code along."""
    found = []
    for name, entry in read_json(folder / INDEX).items():
        if not isinstance(entry, list):
            continue
        if len(entry) != 2 or not _is_loadable(entry[0]):
            raise ConfigError(
                f"{folder / INDEX}: {name}: got {brief(entry)}, expected [library, class] with a library of"
                f" {', '.join(LIBRARIES)} or a pipeline module of diffusers; custom code is not run"
            )
        if entry[0] is not None and any((folder / name).glob("*.safetensors")):
            found.append(folder / name)
    scripts = sorted(folder.rglob("*.py"))
    if scripts:
        raise ConfigError(
            f"{scripts[0]}: a checkpoint with code; it is never run, so remove the file if it is not needed"
        )
    return found


def hosted_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the weights of all components, from the safetensors headers."""
    return sum(weights_bytes(part, dtype.itemsize) for part in component_folders(folder))


def pipeline_class(name: str) -> Any:
    """The class of that name, with the library that it needs; ConfigError where that is missing."""
    import diffusers

    found = getattr(diffusers, name)
    if not issubclass(found, diffusers.DiffusionPipeline):
        try:
            found()  # a placeholder of diffusers, which names the library that is missing
        except ImportError as error:
            raise _missing_library(name, error) from error
        raise ConfigError(f"pipeline: {name} is no DiffusionPipeline")
    return found


def load_pipeline(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of class `name` with the folder's weights."""
    from diffusers.utils import is_accelerate_available

    component_folders(folder)
    try:
        with _no_progress_bars():
            pipeline = pipeline_class(name).from_pretrained(
                folder,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=is_accelerate_available(),
            )
    except ImportError as error:
        raise _missing_library(name, error) from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: {name} cannot be loaded from it: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _missing_library(name: str, error: ImportError) -> ConfigError:
    return ConfigError(f"pipeline: {name} needs a library that is not installed: {error}")


def sample_rate(pipeline: Any) -> int:
    """Hz of what an audio pipeline makes; ConfigError where it says none."""
    for component, key in SAMPLE_RATES:
        config = getattr(getattr(pipeline, component, None), "config", None)
        rate = getattr(config, key, None)
        if rate is not None:
            return int(rate)
    if isinstance(getattr(pipeline, "sample_rate", None), int):
        return int(pipeline.sample_rate)
    raise ConfigError(f"output: got 'audio', but {type(pipeline).__name__} states no sample rate; is it for images?")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Turns off what diffusers and transformers draw while they load, where it is on."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    drawing = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
    for each in drawing:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in drawing:
            each.enable_progress_bar()


def _is_loadable(library: object) -> bool:
    from diffusers import pipelines

    return library is None or library in LIBRARIES or (isinstance(library, str) and library in dir(pipelines))
