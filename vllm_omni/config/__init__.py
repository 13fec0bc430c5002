"""Stage configs: frozen dataclasses (schema), YAML and overrides (loader), the DAG (graph)."""

from vllm_omni.config.schema import (
    DiTCacheConfig,
    LimitsConfig,
    OmniConfig,
    SchedulerConfig,
    SchedulerType,
    StageConfig,
)

__all__ = ["DiTCacheConfig", "LimitsConfig", "OmniConfig", "SchedulerConfig", "SchedulerType", "StageConfig"]
