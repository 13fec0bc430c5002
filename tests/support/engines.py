"""Specs and engines by themselves, without a loop around them."""

from __future__ import annotations

from typing import Any

import torch

from vllm_omni import registry
from vllm_omni.config.schema import DiTCacheConfig, OmniConfig, StageConfig
from vllm_omni.engine.base import Activity, EngineContext, ReadPorts, StageEngine
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool


def spec_of(stage: StageConfig, config: OmniConfig | None = None) -> Any:
    """The spec of a stage, as a pipeline makes it."""
    return registry.resolve("stage kind", stage.kind).describe(stage, config or OmniConfig(), ModelFolders())


def context_of(
    config: OmniConfig | None = None,
    *,
    whole: frozenset[str] | set[str] = frozenset(),
    streamed: frozenset[str] | set[str] = frozenset(),
    models: ModelPool | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    dit_cache: DiTCacheConfig | None = None,
) -> EngineContext:
    """What an engine is given. whole, streamed: the ports that somebody reads."""
    config = config or OmniConfig()
    return EngineContext(
        device=torch.device(device),
        dtype=dtype,
        models=models or ModelPool(),
        background=Background(),
        reads=ReadPorts(frozenset(whole), frozenset(streamed)),
        limits=config.limits,
        dit_cache=dit_cache or config.dit_cache,
    )


def is_busy(engine: StageEngine) -> bool:
    return engine.activity() is Activity.BUSY
