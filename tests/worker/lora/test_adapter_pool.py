"""The adapters of a model within a budget: what a request holds stays, and nothing is left when it is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_omni.errors import CheckpointError
from vllm_omni.layers.lora import Adapter
from vllm_omni.worker.lora.folders import LoRAFile
from vllm_omni.worker.lora.plan import LoRAPlan, Piece
from vllm_omni.worker.lora.pool import AdapterPool
from vllm_omni.worker.lora.target import Place

SIZES = [10, 10, 20, 40, 60]
BUDGET = 100


def plan(index: int) -> LoRAPlan:
    """Of SIZES[index] bytes; the last one's file is bad."""
    piece = Piece(Place("layer", slice(0, SIZES[index] - 1), 1), "down", "up", rank=1, factor=1.0)
    return LoRAPlan(LoRAFile(Path(f"/{index}"), 1, 1), (piece,))


def load(given: LoRAPlan) -> Adapter:
    if given.file == plan(len(SIZES) - 1).file:
        raise CheckpointError("damaged")
    return Adapter({}, given.num_bytes(1))


OPERATIONS = st.lists(
    st.tuples(st.integers(0, 5), st.one_of(st.none(), st.lists(st.integers(0, 4), max_size=3, unique=True))),
    max_size=40,
)


@given(OPERATIONS)
@settings(max_examples=200, deadline=None)
def test_any_order_of_owners_keeps_the_budget(operations: list[tuple[int, list[int] | None]]) -> None:
    """(owner, what it acquires; None: it releases)."""
    pool = AdapterPool(BUDGET, 1, load)
    held: dict[int, list[int]] = {}
    for owner, wanted in operations:
        if wanted is None:
            pool.release(owner)
            held.pop(owner, None)
        elif owner not in held:
            plans = [plan(index) for index in wanted]
            in_use = {index for indices in held.values() for index in indices}
            fits = sum(SIZES[index] for index in in_use | set(wanted)) <= BUDGET
            assert pool.has_room(plans) == fits
            if 4 in wanted and fits:
                with pytest.raises(CheckpointError):
                    pool.acquire(owner, plans)
            else:
                found = pool.acquire(owner, plans)
                assert (found is not None) == fits
                if found is not None:
                    assert [adapter.num_bytes for adapter in found] == [SIZES[index] for index in wanted]
                    held[owner] = wanted
        pool.check_integrity()
        assert pool.get_stats()["owners"] == len(held)


def test_the_least_recently_used_goes_first_and_nothing_that_is_held() -> None:
    pool = AdapterPool(50, 1, load)
    pool.acquire("a", [plan(0)])
    for index in (1, 2):
        pool.acquire(index, [plan(index)])
        pool.release(index)
    assert pool.acquire("b", [plan(3)]) is not None, "both that nobody holds gave way"
    assert pool.get_stats()["evictions"] == 2
    loads = pool.get_stats()["loads"]
    assert pool.acquire("c", [plan(0)]) is not None and pool.get_stats()["loads"] == loads
