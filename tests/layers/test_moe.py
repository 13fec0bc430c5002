"""Sparse experts: the definition, and rows that do not depend on their batch-mates."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vllm_omni.layers.linear import Linear, pack_linears
from vllm_omni.layers.moe import SparseMLP

WIDTH = 16


class Expert(nn.Module):
    """A projection that counts the rows it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = Linear(WIDTH, WIDTH)
        self.num_rows = 0

    def forward(self, states: Tensor) -> Tensor:
        self.num_rows += len(states)
        projected: Tensor = self.projection(states)
        return projected.tanh()


def make_layer(num_experts: int = 5, num_chosen: int = 2, normalises: bool = False) -> Any:
    torch.manual_seed(0)
    return SparseMLP(
        WIDTH, Expert, num_experts=num_experts, num_chosen=num_chosen, normalises=normalises
    ).requires_grad_(False)


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(0, 9), num_chosen=st.integers(1, 5), normalises=st.booleans(), seed=st.integers(0, 99))
def test_a_token_is_the_weighted_sum_of_its_likeliest_experts(
    num_rows: int, num_chosen: int, normalises: bool, seed: int
) -> None:
    layer = make_layer(num_chosen=num_chosen, normalises=normalises)
    torch.manual_seed(seed)
    states = torch.randn(num_rows, WIDTH)
    expected = torch.zeros_like(states)
    for row, state in enumerate(states):
        weights, experts = layer.gate(state).softmax(-1).topk(num_chosen)
        weights = weights / weights.sum() if normalises else weights
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            expected[row] += weight * layer.experts[expert](state[None])[0]
    torch.testing.assert_close(layer(states), expected)


def test_no_expert_computes_a_row_that_did_not_choose_it() -> None:
    layer = make_layer()
    layer(torch.randn(7, WIDTH))
    assert sum(expert.num_rows for expert in layer.experts) == 7 * 2


def test_a_row_is_the_same_alone_in_a_crowd_and_in_another_order() -> None:
    layer = make_layer()
    pack_linears(layer)
    states = torch.randn(33, WIDTH)
    crowd = layer(states)
    torch.testing.assert_close(layer(states.flip(0)).flip(0), crowd, rtol=0, atol=0)
    for row in range(len(states)):
        torch.testing.assert_close(layer(states[row : row + 1])[0], crowd[row], rtol=0, atol=0)
