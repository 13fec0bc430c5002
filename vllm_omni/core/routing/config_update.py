"""What of a configuration may change while requests are under way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from vllm_omni.config.schema import OmniConfig
from vllm_omni.core.routing.request_state import RequestState
from vllm_omni.errors import ConfigError

CHANGEABLE = frozenset({"scheduler", "dit_cache", "request_timeout", "worker_timeout"})


def check_update(old: OmniConfig, new: OmniConfig, is_loaded: bool, unfinished: Iterable[RequestState]) -> None:
    """Raises ConfigError where a loaded stage or an unfinished request counts on what would change."""
    if is_loaded:
        for field in dataclasses.fields(OmniConfig):
            if field.name not in CHANGEABLE and getattr(new, field.name) != getattr(old, field.name):
                raise ConfigError(
                    f"{field.name}: cannot change while stages are loaded; close this one and make another"
                )
        if new.dit_cache.max_memory_mb != old.dit_cache.max_memory_mb:
            raise ConfigError("dit_cache.max_memory_mb: cannot change while stages are loaded")
    for state in unfinished:
        if state.priority not in new.scheduler.priority_weights:
            raise ConfigError(
                f"scheduler.priority_weights: {state.priority!r} is missing, but an unfinished request has it"
            )
