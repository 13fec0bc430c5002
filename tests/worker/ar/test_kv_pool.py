"""The KV pool: what is planned is what is allocated, and slots follow the block table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.errors import ConfigError
from vllm_omni.worker.ar.kv_pool import DEFAULT_POOL, KVLayout, KVPool, KVPoolPlan, activation_bytes, plan_kv_pool

CPU = torch.device("cpu")
MB = 2**20


@dataclass(frozen=True)
class ToyModel:
    """The sizes of a language model."""

    vocab_size: int = 100
    hidden_size: int = 32
    intermediate_size: int = 64
    num_layers: int = 3
    num_kv_heads: int = 2
    head_dim: int = 16
    max_position_embeddings: int = 256
    can_write: bool = True


def plan(
    *,
    tapped: tuple[int, ...] = (),
    can_write: bool = True,
    mb: float | None = None,
    num_blocks: int | None = None,
    granted_bytes: int = 0,
) -> KVPoolPlan:
    return plan_kv_pool(
        ToyModel(),
        itemsize=4,
        block_size=4,
        can_write=can_write,
        tapped_layers=tapped,
        model_len=10,
        least_len=5,
        max_num_seqs=8,
        kv_memory_mb=mb,
        num_blocks=num_blocks,
        granted_bytes=granted_bytes,
    )


def make_pool(layout: KVLayout, num_blocks: int = 6, has_scratch: bool = False) -> KVPool:
    return KVPool(layout, num_blocks=num_blocks, block_size=4, device=CPU, dtype=torch.float32, has_scratch=has_scratch)


@given(tapped=st.sets(st.integers(0, 3), max_size=4), can_write=st.booleans())
def test_what_is_planned_is_what_is_allocated(tapped: set[int], can_write: bool) -> None:
    layout = KVLayout.of(ToyModel(), can_write=can_write, tapped_layers=tapped)
    planned = plan(tapped=tuple(tapped), can_write=can_write, num_blocks=6)
    assert make_pool(layout).num_bytes == 6 * planned.block_bytes
    assert make_pool(layout, 5, has_scratch=True).num_bytes == 6 * planned.block_bytes


def test_a_model_that_does_not_write_has_layers_up_to_the_last_tapped_one() -> None:
    assert KVLayout.of(ToyModel(), can_write=False, tapped_layers=[2, 0]).num_layers == 2
    assert KVLayout.of(ToyModel(), can_write=True, tapped_layers=[2, 0]).num_layers == 3
    assert KVLayout.of(ToyModel(), can_write=False, tapped_layers=[0]).token_bytes(4) == 32 * 4


def test_the_plan_says_what_limits_it() -> None:
    block_bytes = plan().block_bytes
    assert block_bytes == 3 * 2 * 2 * 16 * 4 * 4
    assert plan(mb=1.0) == KVPoolPlan(3 * 8, block_bytes, "max_num_seqs")
    assert plan(num_blocks=5) == KVPoolPlan(5, block_bytes, "num_blocks")
    assert plan(mb=7 * block_bytes / MB) == KVPoolPlan(7, block_bytes, "kv_memory_mb")
    with pytest.raises(ConfigError, match=r"kv_memory_mb: got 0\.001, expected at least 0\.00293, one block"):
        plan(mb=0.001)


def test_a_pool_of_no_given_size_holds_one_sequence_and_what_is_granted() -> None:
    block_bytes = plan().block_bytes
    assert plan(mb=None) == KVPoolPlan(2, block_bytes, DEFAULT_POOL, num_wanted=3 * 8 - 2)
    assert plan(mb=None, granted_bytes=2 * block_bytes) == KVPoolPlan(
        4, block_bytes, DEFAULT_POOL, num_wanted=3 * 8 - 4
    )
    assert plan(mb=None, granted_bytes=10**9) == KVPoolPlan(3 * 8, block_bytes, "max_num_seqs")


def test_activations_are_those_of_the_widest_moment() -> None:
    sizes = {"itemsize": 2, "max_num_batched_tokens": 10, "max_num_seqs": 50}
    assert activation_bytes(ToyModel(), **sizes, can_write=False) == 10 * (4 * 32 + 3 * 64) * 2
    assert activation_bytes(ToyModel(), **sizes, can_write=True) == 50 * 100 * 6


@given(table=st.permutations(range(6)), data=st.data())
def test_slots_follow_the_block_table(table: list[int], data: st.DataObject) -> None:
    pool = make_pool(KVLayout.of(ToyModel(), can_write=True, tapped_layers=[]))
    sequence = Sequence(0, "r", [7] * 24, max_tokens=24)
    sequence.block_table = table
    start = data.draw(st.integers(0, 24))
    stop = data.draw(st.integers(start, 24))
    flat = [block * 4 + offset for block in table for offset in range(4)]
    assert pool.slots(sequence, start, stop) == flat[start:stop]


def test_tapped_states_of_tokens_that_are_not_computed_are_refused() -> None:
    sequence = Sequence(0, "r", [7] * 8, max_tokens=8)
    sequence.block_table, sequence.num_computed_tokens = [3, 1], 5
    tapped = make_pool(KVLayout.of(ToyModel(), can_write=True, tapped_layers=[1, 3]))
    assert tapped.tapped_states(sequence, [3, 1, 3], 2, 5).shape == (3, 3 * 32)
    with pytest.raises(ValueError, match="not tapped, or not computed yet"):
        tapped.tapped_states(sequence, [1], 2, 6)
    with pytest.raises(ValueError, match="not tapped"):
        make_pool(KVLayout.of(ToyModel(), can_write=True, tapped_layers=[])).tapped_states(sequence, [1], 0, 1)
