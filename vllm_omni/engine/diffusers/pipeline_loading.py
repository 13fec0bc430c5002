"""Loads the pipeline of a folder, and asks it what it makes. Only here are weights read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_omni.engine.diffusers.pipeline_class import missing_library
from vllm_omni.engine.diffusers.pipeline_folder import SAMPLE_RATES, PipelineFolder
from vllm_omni.errors import CheckpointError, ConfigError


def load_pipeline(folder: PipelineFolder, pipeline_type: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of that class with the folder's weights."""
    from diffusers.utils import is_accelerate_available

    name = pipeline_type.__name__
    try:
        with _no_progress_bars():
            pipeline = pipeline_type.from_pretrained(
                folder.path,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=is_accelerate_available(),
                variant=folder.variant,
            )
    except ImportError as error:
        raise missing_library(name, error) from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder.path}: {name} cannot be loaded from it: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def sample_rate(pipeline: Any) -> int:
    """Hz of what an audio pipeline makes; ConfigError where it says none."""
    for component, key in SAMPLE_RATES:
        config = getattr(getattr(pipeline, component, None), "config", None)
        rate = getattr(config, key, None)
        if rate is not None:
            return int(rate)
    if isinstance(getattr(pipeline, "sample_rate", None), int):
        return int(pipeline.sample_rate)
    raise ConfigError(f"output: got sound, but {type(pipeline).__name__} states no sample rate; is it for images?")


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
