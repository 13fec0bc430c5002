"""DiTCacheManager, the step caches and the step scheduler as pure state machines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.config.schema import DiTCacheConfig
from vllm_omni.core.diffusion.caches.first_block import FirstBlockCache
from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.core.diffusion.step_scheduler import StepScheduler
from vllm_omni.errors import CacheError, SchedulerError


def test_the_least_recently_used_goes_first() -> None:
    caches = DiTCacheManager(max_bytes=30)
    for key in "abc":
        caches.set_cache(key, key.upper(), 10)
    assert caches.get_cache("a") == "A"
    caches.set_cache("d", "D", 10)
    assert "b" not in caches and all(key in caches for key in "acd")


def test_what_can_never_fit_is_refused_and_evicts_nobody() -> None:
    caches = DiTCacheManager(max_bytes=10)
    caches.set_cache("a", 1, 10)
    assert not caches.set_cache("b", 2, 11)
    assert "a" in caches and caches.get_stats()["refused"] == 1


def test_hit_rate_counts_lookups() -> None:
    caches = DiTCacheManager(max_bytes=10)
    assert caches.get_hit_rate() == 0.0
    caches.set_cache("a", 1, 1)
    caches.get_cache("a")
    caches.get_cache("b")
    assert caches.get_hit_rate() == 0.5
    with pytest.raises(CacheError):
        caches.set_cache("x", 1, -1)
    with pytest.raises(CacheError):
        DiTCacheManager(max_bytes=-1)


def test_the_budget_comes_from_the_config_and_tensors_are_measured() -> None:
    caches = DiTCacheManager(DiTCacheConfig(max_memory_mb=0.001))
    assert caches.max_bytes == 1048
    assert caches.set_cache("a", torch.zeros(100)) and caches.used_bytes == 400
    assert caches.set_cache("b", {"x": torch.zeros(10), "y": [torch.zeros(5)]}) and caches.used_bytes == 460
    assert not caches.set_cache("c", torch.zeros(1000)) and "a" in caches
    assert caches.set_cache("d", "words") and caches.used_bytes > 460


OPERATIONS = st.tuples(
    st.sampled_from(["set", "get", "drop", "drop_many", "clear"]), st.integers(0, 6), st.integers(0, 40)
)


@given(st.lists(OPERATIONS, max_size=60))
def test_random_operations_keep_the_books(operations: list[tuple[str, int, int]]) -> None:
    caches, kept = DiTCacheManager(max_bytes=100), {}
    for operation, key, size in operations:
        if operation == "set":
            assert caches.set_cache(key, (key, size), size)
            kept[key] = (key, size)
        elif operation == "get":
            assert caches.get_cache(key) in (None, kept.get(key))
        elif operation == "drop":
            caches.invalidate_cache(key)
            assert key not in caches
        elif operation == "drop_many":
            caches.invalidate_where(lambda k, key=key: k <= key)  # type: ignore[misc]
            assert not any(k in caches for k in range(key + 1))
        else:
            caches.clear()
        caches.check_integrity()
        assert caches.used_bytes <= 100
    caches.clear()
    assert caches.used_bytes == 0 and len(caches) == 0


def test_first_block_compares_with_the_last_computed_step() -> None:
    """Small changes add up: 1.00 -> 1.06 -> 1.12 is within 8% step by step, but not from the last computed one."""
    cache, rest = FirstBlockCache(0.08), torch.ones(2, 3)
    assert cache.reuse(torch.ones(2, 3)) is None
    cache.update(torch.ones(2, 3), rest)
    assert cache.reuse(torch.full((2, 3), 1.06)) is rest
    assert cache.reuse(torch.full((2, 3), 1.12)) is None


def test_first_block_threshold_is_inclusive_and_zero_never_reuses_a_change() -> None:
    cache = FirstBlockCache(0.0)
    cache.update(torch.ones(4), torch.ones(4))
    assert cache.reuse(torch.ones(4)) is not None
    assert cache.reuse(torch.ones(4) + 1e-3) is None
    assert FirstBlockCache(None).threshold == FirstBlockCache.default_threshold
    assert cache.num_bytes == 2 * 4 * 4


def test_first_block_of_a_dead_block_is_always_computed() -> None:
    cache = FirstBlockCache()
    cache.update(torch.zeros(3), torch.ones(3))
    assert cache.reuse(torch.zeros(3)) is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "schedule", "remove"]), st.integers(0, 8), st.integers(1, 60)), max_size=60
    )
)
def test_the_step_scheduler_keeps_its_bounds_and_loses_nobody(operations: list[tuple[str, int, int]]) -> None:
    scheduler: StepScheduler[int] = StepScheduler(100, 3)
    held: set[int] = set()
    for operation, key, size in operations:
        if operation == "add" and key in held:
            with pytest.raises(SchedulerError, match="already"):
                scheduler.add(str(key), size, key)
        elif operation == "add":
            scheduler.add(str(key), size, key)
            held.add(key)
        elif operation == "remove":
            assert scheduler.remove(str(key)) == (key in held)
            held.discard(key)
        else:
            batch = scheduler.schedule()
            assert set(batch) <= held and bool(batch) == bool(held)
        scheduler.check_integrity()
        assert len(scheduler) == len(held)
