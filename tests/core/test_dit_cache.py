"""DiTCacheManager and the step scheduler as pure state machines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.config.schema import DiTCacheConfig
from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.core.diffusion.step_scheduler import StepScheduler
from vllm_omni.errors import CacheError, ResourceError, SchedulerError


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


def test_what_is_reserved_is_never_evicted_and_others_make_room_for_it() -> None:
    caches = DiTCacheManager(max_bytes=30)
    caches.set_cache("old", 1, 10)
    caches.set_cache("new", 2, 10)
    assert caches.reserve("owner", 20)
    assert "old" not in caches and "new" in caches
    assert caches.set_cache("row", 3, 15, owner="owner") and caches.used_bytes == 30
    assert not caches.set_cache("large", 4, 11) and not caches.reserve("second", 11)
    assert caches.set_cache("other", 5, 10) and caches.get_cache("row") == 3
    assert caches.release("owner") and "row" not in caches and caches.used_bytes == 10
    assert not caches.release("owner")


def test_an_owner_keeps_within_what_it_reserved() -> None:
    caches = DiTCacheManager(max_bytes=30)
    assert caches.reserve("owner", 20)
    with pytest.raises(CacheError, match="reserved 20 bytes already"):
        caches.reserve("owner", 1)
    caches.set_cache("row", 1, 20, owner="owner")
    caches.set_cache("row", 2, 20, owner="owner")
    with pytest.raises(CacheError, match="got 21 bytes, expected at most the 20 reserved"):
        caches.set_cache("second", 3, 1, owner="owner")
    with pytest.raises(CacheError, match="at most the 0 reserved"):
        caches.set_cache("x", 3, 1, owner="nobody")
    caches.check_integrity()


OPERATIONS = st.tuples(
    st.sampled_from(["set", "drop", "reserve", "fill", "release"]), st.integers(0, 6), st.integers(0, 40)
)


@given(st.lists(OPERATIONS, max_size=60))
def test_random_operations_keep_to_the_budget_and_lose_nothing_reserved(operations: list[tuple[str, int, int]]) -> None:
    """Plain values stand under their key, an owner's under (owner, 0)."""
    caches, kept = DiTCacheManager(max_bytes=100), {}
    reserved: dict[int, int] = {}
    filled: set[int] = set()
    for operation, key, size in operations:
        if operation == "set":
            assert caches.set_cache(key, (key, size), size) == (sum(reserved.values()) + size <= 100)
            kept[key] = (key, size)
        elif operation == "drop":
            caches.invalidate_cache(key)
            assert key not in caches
        elif operation == "reserve" and key not in reserved:
            if caches.reserve(key, size):
                reserved[key] = size
            else:
                assert sum(reserved.values()) + size > 100
        elif operation == "fill" and reserved.get(key, -1) >= size:
            assert caches.set_cache((key, 0), key, size, owner=key)
            filled.add(key)
        elif operation == "release":
            assert caches.release(key) == (key in reserved)
            reserved.pop(key, None)
            filled.discard(key)
        assert caches.get_cache(key) in (None, kept.get(key))
        caches.check_integrity()
        assert sum(reserved.values()) <= caches.used_bytes <= 100
        assert {owner for owner in range(7) if (owner, 0) in caches} == filled
    for owner in list(reserved):
        caches.release(owner)
    for key in range(7):
        caches.invalidate_cache(key)
    assert caches.used_bytes == 0 and len(caches) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "schedule", "remove"]), st.integers(0, 8), st.integers(1, 60), st.integers(0, 12)
        ),
        max_size=60,
    )
)
def test_the_step_scheduler_keeps_its_bounds_and_turns_and_loses_nobody(
    operations: list[tuple[str, int, int, int]],
) -> None:
    caches = DiTCacheManager(max_bytes=10)
    scheduler: StepScheduler[int] = StepScheduler(100, 3, caches)
    held: dict[int, int] = {}  # in order of arrival, with their bytes
    sizes: dict[int, int] = {}
    batch: list[int] = []  # of the last step
    turns: dict[int, int] = {}  # who has started, with the tokens of the turn
    for operation, key, size, num_bytes in operations:
        if operation == "add" and key in held:
            with pytest.raises(SchedulerError, match="already"):
                scheduler.add(str(key), key, size)
        elif operation == "add" and num_bytes > 10:
            with pytest.raises(ResourceError, match=r"dit_cache\.max_memory_mb.*needs 1\d bytes, expected at most 10"):
                scheduler.add(str(key), key, size, num_bytes)
        elif operation == "add":
            scheduler.add(str(key), key, size, num_bytes)
            held[key], sizes[key] = num_bytes, size
        elif operation == "remove":
            assert scheduler.remove(str(key)) == (key in held)
            held.pop(key, None)
            turns.pop(key, None)
            batch = [other for other in batch if other != key]
        else:
            before, batch = batch, scheduler.schedule()
            assert bool(batch) == bool(held), "never idle while somebody waits"
            assert len(batch) == 1 or sum(sizes[other] for other in batch) <= 100
            stays = [other for other in before if turns[other] < 8 * 100]
            assert batch[: len(stays)] == stays, "who is in stays in for a turn"
            new = [other for other in batch if other not in turns]
            assert new == [other for other in held if other not in turns][: len(new)], "who is new starts in order"
            for other in batch:
                turns[other] = sizes[other] + (turns[other] if other in stays else 0)
        scheduler.check_integrity()
        assert caches.used_bytes == sum(held[other] for other in turns), "who has started keeps its step cache"
        assert len(scheduler) == len(held)


def test_a_sample_waits_until_its_step_cache_fits() -> None:
    scheduler: StepScheduler[str] = StepScheduler(100, 8, DiTCacheManager(max_bytes=10))
    for key, num_bytes in (("a", 6), ("b", 5), ("c", 1)):
        scheduler.add(key, key, 1, num_bytes)
    assert scheduler.schedule() == ["a"], "c does not overtake b"
    scheduler.remove("a")
    assert scheduler.schedule() == ["b", "c"]


def test_small_samples_get_a_turn_beside_a_large_one_and_it_goes_on_behind_them() -> None:
    scheduler: StepScheduler[str] = StepScheduler(100, 8, DiTCacheManager(max_bytes=10))
    scheduler.add("large", "large", 250, 6)
    assert [scheduler.schedule() for _ in range(3)] == [["large"]] * 3
    for name in ("a", "b"):
        scheduler.add(name, name, 50)
    steps = [scheduler.schedule() for _ in range(4)]
    assert steps == [["large"], ["a", "b"], ["a", "b"], ["a", "b"]]
    scheduler.remove("a")
    scheduler.add("c", "c", 40, 5)
    assert scheduler.schedule() == ["b"], "the large one comes before c, and needs all of a step"
    scheduler.remove("b")
    assert scheduler.schedule() == ["large"]
    scheduler.remove("large")
    assert scheduler.schedule() == ["c"]


def test_who_has_a_step_cache_goes_on_where_the_next_one_has_no_room_for_its_own() -> None:
    scheduler: StepScheduler[str] = StepScheduler(100, 8, DiTCacheManager(max_bytes=10))
    scheduler.add("first", "first", 100, 6)
    for _ in range(8):
        scheduler.schedule()
    scheduler.add("second", "second", 100, 6)
    assert [scheduler.schedule() for _ in range(20)] == [["first"]] * 20
    scheduler.remove("first")
    assert scheduler.schedule() == ["second"]


@given(
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=12),
    steps=st.lists(st.integers(1, 200), min_size=12, max_size=12),
)
def test_nobody_waits_longer_than_a_turn_of_everybody_else(sizes: list[int], steps: list[int]) -> None:
    """steps: of each sample, after which it is removed."""
    scheduler: StepScheduler[int] = StepScheduler(100, 3, DiTCacheManager(max_bytes=1))
    left = dict(enumerate(steps[: len(sizes)]))
    waited = dict.fromkeys(left, 0)
    for key, size in enumerate(sizes):
        scheduler.add(str(key), key, size)
    longest = sum(-(-8 * 100 // size) for size in sizes)
    while left:
        batch = scheduler.schedule()
        for key in list(left):
            waited[key] = 0 if key in batch else waited[key] + 1
            assert waited[key] <= longest
            left[key] -= key in batch
            if left[key] == 0:
                del left[key]
                scheduler.remove(str(key))
        scheduler.check_integrity()
    assert len(scheduler) == 0
