"""Memory of results goes to the next ones when nobody holds them, and not before."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_omni.layers.native.results import LEAST_BYTES, result, reused_results

LIKE = torch.empty(0, dtype=torch.bfloat16)
LARGE = LEAST_BYTES  # numbers of two bytes


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def test_a_result_lies_where_one_of_its_size_was_that_nobody_holds() -> None:
    with reused_results():
        first = result(LIKE, 2, LARGE)
        place = first.data_ptr()
        assert (first.shape, first.dtype, place % 64) == ((2, LARGE), torch.bfloat16, 0)
        view = first[1:].float_power(1)[0, :1], first.permute(1, 0)[5:6]  # of them the second is in its memory
        del first
        beside = result(LIKE, LARGE, 2)
        assert beside.data_ptr() != place
        del view
        assert result(LIKE, LARGE, 2).data_ptr() == place
        assert result(LIKE, 2 * LARGE).data_ptr() == place  # the one before it is gone again


def test_small_results_and_those_of_nobody_are_torchs_own() -> None:
    with reused_results():
        small = result(LIKE, LEAST_BYTES // 2 - 1)
    alone = result(LIKE, 2 * LARGE)
    for made in (small, alone):
        assert made.untyped_storage().nbytes() == made.nbytes and made.untyped_storage().resizable()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_what_is_held_keeps_its_numbers(steps: list[tuple[bool, int]]) -> None:
    held: dict[int, torch.Tensor] = {}
    with reused_results():
        for is_new, name in steps:
            if is_new:
                held[name] = result(LIKE, LARGE // 2 + name % 2).fill_(name)
            else:
                held.pop(name, None)
            assert all(bool((numbers == name).all()) for name, numbers in held.items())
    assert all(bool((numbers == name).all()) for name, numbers in held.items())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_no_more_memory_than_results_hold_by_themselves() -> None:
    gc.collect()
    before, megabytes = resident_bytes(), 2**20
    with reused_results():
        for count in (64, 96, 64, 96):
            result(LIKE, count * megabytes // 2).fill_(1)
            assert resident_bytes() - before < (count + 16) * megabytes
        del count
    assert resident_bytes() - before < 16 * megabytes
