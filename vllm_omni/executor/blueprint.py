"""All that another process needs to make a stage's spec and engine as they are here: plain data, no objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import device as Device
from torch import dtype as DType

from vllm_omni.config.schema import OmniConfig
from vllm_omni.engine.base import EngineContext, ReadPorts, StageEngine, StageSpec
from vllm_omni.executor.pipeline import describe_stage
from vllm_omni.utils.device import set_threads
from vllm_omni.utils.files import FetchedFolder, ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool


@dataclass(frozen=True, slots=True)
class StageBlueprint:
    """Of one stage; where it is read, the registry knows the kinds of the config's stages."""

    config: OmniConfig
    stage: str
    fetched: Sequence[FetchedFolder]  # repositories that were looked up when the config was read; none is twice
    granted_bytes: int | None  # of memory; None: it asked for none
    reads: ReadPorts
    device: Device
    dtype: DType
    threads: int | None  # of torch on the CPU; None: as it is
    # of its output ports those that are read whole, and by processes alone that use the same device
    stays_on_device: frozenset[str] = frozenset()

    def describe(self) -> StageSpec:
        """The spec, as `Pipeline` made it."""
        fetched = [each for each in self.fetched if each[-1].is_dir()]  # on another machine they are looked up again
        spec = describe_stage(self.config.stages[self.stage], self.config, ModelFolders(fetched=fetched))
        if self.granted_bytes is not None:
            spec.grant_memory(self.granted_bytes)
        return spec

    def load(self, spec: StageSpec, background: Background, models: ModelPool) -> StageEngine:
        """The engine, its weights loaded into `models`: nobody else in this process shares them."""
        if self.threads is not None:
            set_threads(self.threads)
        context = EngineContext(
            device=self.device,
            dtype=self.dtype,
            models=models,
            background=background,
            reads=self.reads,
            limits=self.config.limits,
            dit_cache=self.config.dit_cache,
        )
        return spec.load(context)
