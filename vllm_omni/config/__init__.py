"""Stage configs: from a YAML file and overrides to frozen dataclasses, and the graph that they describe."""

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
