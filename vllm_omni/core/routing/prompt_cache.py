"""What stages made of prompts, above all embeddings, kept from one request to the next within a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.core.routing.budgets import MIB
from vllm_omni.payload import StagePayload

KEPT_COUNTS = ("prompt_tokens", "truncated_tokens")  # that a cached payload says of the prompt all the same


class PromptCache:
    """Payloads by stage and `StageSpec.cache_key`, the least recently used evicted first. max_mb: 0 keeps none."""

    def __init__(self, max_mb: float) -> None:
        self._kept = DiTCacheManager(max_bytes=int(max_mb * MIB))

    def put(self, stage: str, key: str, payload: StagePayload, metrics: Mapping[str, Any]) -> None:
        """metrics: of the task that made it."""
        num_bytes = payload.num_bytes + len(key) + len(repr(payload.meta))  # text takes memory too
        counts = {name: metrics[name] for name in KEPT_COUNTS if name in metrics}
        self._kept.set_cache((stage, key), (payload, counts), num_bytes)

    def get(self, stage: str, key: str, request_id: str) -> tuple[StagePayload, dict[str, Any]] | None:
        """The payload as this request's, and the metrics of a task that had nothing to compute; None where there is
        none, or what it holds is lost.
        """
        kept: tuple[StagePayload, dict[str, Any]] | None = self._kept.get_cache((stage, key))
        if kept is None or kept[0].is_lost:
            return None
        payload, counts = kept
        return replace(payload, request_id=request_id), {"cached": True, "steps": 0, **counts}

    @property
    def hit_rate(self) -> float:
        """Of all looks so far."""
        return self._kept.get_hit_rate()

    def get_stats(self) -> dict[str, float]:
        """As DiTCacheManager.get_stats."""
        return self._kept.get_stats()

    def check_integrity(self) -> None:
        """CacheError where sizes do not add up."""
        self._kept.check_integrity()
