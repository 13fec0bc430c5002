"""The shape of a stage config file: OmniConfig, but for the groups that a YAML spells differently.

Knows no file and no stage kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_omni.config.builder import fields_by_key
from vllm_omni.config.schema import (
    DiTCacheConfig,
    LimitsConfig,
    OmniConfig,
    PromptsConfig,
    RayConfig,
    SchedulerConfig,
    StageConfig,
)
from vllm_omni.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["auto", "none", "int8", "fp8", "bfloat16"]
Offload = Literal["none", "weights"]

_DEFAULTS = OmniConfig()


@dataclass(frozen=True, slots=True)
class SchedulerGroup(SchedulerConfig):
    """`scheduler:`; the timeouts go to OmniConfig.request_timeout and OmniConfig.worker_timeout."""

    request_timeout_s: float | None = None  # None: requests that set none have no deadline
    worker_timeout_s: float = _DEFAULTS.worker_timeout

    def narrowed(self) -> SchedulerConfig:
        """The part that is the scheduler's own."""
        return SchedulerConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SchedulerConfig)})


@dataclass(frozen=True, slots=True)
class ResourcesGroup:
    """`resources:`; all go to the fields of the same name of OmniConfig."""

    max_memory_gb: float = _DEFAULTS.max_memory_gb
    max_gpu_utilization: float = _DEFAULTS.max_gpu_utilization
    threads: int | None = _DEFAULTS.threads


@dataclass(frozen=True, slots=True)
class ConfigDocument:
    """The whole file. revision, device, dtype, executor, process: the default of stages that do not say their own."""

    stages: Mapping[str, Mapping[str, Any]]
    outputs: tuple[str, ...]
    name: str = _DEFAULTS.name
    model: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    executor: str = "auto"
    process: str | None = None
    imports: str | tuple[str, ...] = field(default=(), metadata={"key": "import"})  # modules that add to the registry
    scheduler: SchedulerGroup = field(default_factory=SchedulerGroup)
    resources: ResourcesGroup = field(default_factory=ResourcesGroup)
    dit_cache: DiTCacheConfig = field(default_factory=DiTCacheConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def with_stages(self, stages: Mapping[str, StageConfig]) -> OmniConfig:
        """The configuration that the rest of the package uses."""
        return OmniConfig(
            name=self.name,
            model=self.model,
            stages=stages,
            outputs=self.outputs,
            scheduler=self.scheduler.narrowed(),
            dit_cache=self.dit_cache,
            limits=self.limits,
            prompts=self.prompts,
            ray=self.ray,
            max_memory_gb=self.resources.max_memory_gb,
            max_gpu_utilization=self.resources.max_gpu_utilization,
            threads=self.resources.threads,
            request_timeout=math.inf if self.scheduler.request_timeout_s is None else self.scheduler.request_timeout_s,
            worker_timeout=self.scheduler.worker_timeout_s,
        )


TOP_LEVEL_KEYS = frozenset(fields_by_key(ConfigDocument))
STAGE_KEYS = frozenset(f.name for f in dataclasses.fields(StageConfig)) - {"name", "options"}


def check_stage_name(name: object) -> None:
    """A stage's name stands in edges, overrides and parameters: an identifier, and no top-level key."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"stages: got the name {name!r}, expected letters, digits and underscores")
    if name in TOP_LEVEL_KEYS:
        raise ConfigError(f"stages.{name}: the name is a top-level key of the config; choose another")
