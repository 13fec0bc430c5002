"""Stage configs: frozen dataclasses (schema), YAML and overrides (loader), the DAG (graph)."""

from vllm_omni.config.schema import (
    DiTCacheConfig,
    EdgeConfig,
    LimitsConfig,
    OmniConfig,
    SchedulerConfig,
    SchedulerType,
    StageConfig,
    StreamConfig,
)

__all__ = [
    "DiTCacheConfig",
    "EdgeConfig",
    "LimitsConfig",
    "OmniConfig",
    "SchedulerConfig",
    "SchedulerType",
    "StageConfig",
    "StreamConfig",
]
