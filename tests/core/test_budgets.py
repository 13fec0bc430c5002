from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.core.routing.budgets import GIB, MIB, MemoryBudget, format_bytes
from vllm_omni.errors import ResourceError


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcde"), st.integers(0, 60)), max_size=60))
def test_books_stay_right_under_random_operations(operations: list[tuple[bool, str, int]]) -> None:
    budget, held = MemoryBudget(100), {}
    for is_reserve, owner, size in operations:
        if is_reserve:
            may = owner not in held and size <= 100 - sum(held.values())
            if may:
                budget.reserve(owner, size)
                held[owner] = size
            else:
                with pytest.raises(ResourceError):
                    budget.reserve(owner, size)
        elif owner in held:
            assert budget.release(owner) == held.pop(owner)
        else:
            with pytest.raises(ResourceError):
                budget.release(owner)
        budget.check_integrity()
        assert budget.used_bytes == sum(held.values())
        assert budget.shares == held


def test_several_owners_get_all_or_nothing() -> None:
    budget = MemoryBudget(10)
    with pytest.raises(ResourceError):
        budget.reserve_all({"a": 6, "b": 6})
    assert budget.used_bytes == 0
    budget.reserve_all({"a": 6, "b": 4})
    assert budget.available_bytes == 0


def test_a_shortage_names_every_share_the_limit_and_the_fix() -> None:
    budget = MemoryBudget(2 * GIB, "resources.max_memory_gb", "raise it")
    with pytest.raises(ResourceError) as caught:
        budget.reserve_all({"text": GIB, "image": 3 * GIB // 2})
    for part in ("resources.max_memory_gb", "text 1.00 GiB", "image 1.50 GiB", "2.50 GiB", "2.00 GiB", "raise it"):
        assert part in str(caught.value)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ResourceError, match="-1"):
        MemoryBudget(10).reserve("a", -1)
    with pytest.raises(ResourceError, match="-5"):
        MemoryBudget(-5)


def test_integrity_check_sees_a_wrong_book() -> None:
    budget = MemoryBudget(10)
    budget.reserve("a", 4)
    budget._used_bytes = 3
    with pytest.raises(ResourceError, match="4 bytes"):
        budget.check_integrity()


@pytest.mark.parametrize(("size", "text"), [(512, "512 bytes"), (24 * MIB, "24.0 MiB"), (3 * GIB // 2, "1.50 GiB")])
def test_bytes_read_well(size: int, text: str) -> None:
    assert format_bytes(size) == text
