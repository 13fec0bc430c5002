"""No step cache: every step is computed whole."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.core.diffusion.caches.base import RowCache, StepCachePolicy
from vllm_omni.errors import CacheError


@dataclass(frozen=True, slots=True)
class NoCacheOptions:
    """Nothing to choose."""


class NoCache(StepCachePolicy):
    """`computes_all` tells the runner not to split a step at all."""

    reference = "every step is computed"
    options_type = NoCacheOptions
    computes_all = True

    def __init__(self, options: NoCacheOptions) -> None:
        pass

    def new_row(self, num_steps: int) -> RowCache:
        raise CacheError("policy 'none' keeps nothing, so it makes no rows")

    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        return 0
