"""Modules on the meta device: nothing is drawn, nothing is lost when they get memory."""

from __future__ import annotations

import torch
from torch import nn

from vllm_omni.layers.meta_device import give_memory, on_meta_device


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.fixed = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16), requires_grad=False)


def test_what_is_made_there_has_shapes_alone_and_draws_no_number() -> None:
    before = torch.get_rng_state()
    with on_meta_device():
        made = Parts()
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    assert torch.equal(torch.get_rng_state(), before)
    assert not nn.Embedding(2, 2).weight.is_meta


def test_first_values_are_drawn_elsewhere_as_ever() -> None:
    with on_meta_device():
        Parts()
    weight = torch.full((4, 4), 7.0)
    nn.init.zeros_(weight)
    assert weight.count_nonzero() == 0


def test_memory_changes_neither_names_nor_kinds() -> None:
    with on_meta_device():
        made = Parts()
    expected = Parts()
    give_memory(made, torch.device("cpu"))
    for name, tensor in expected.state_dict(keep_vars=True).items():
        got = made.state_dict(keep_vars=True)[name]
        assert (got.device.type, got.shape, got.dtype) == ("cpu", tensor.shape, tensor.dtype), name
        assert (type(got), got.requires_grad) == (type(tensor), tensor.requires_grad), name


def test_memory_may_be_given_to_one_module_alone() -> None:
    with on_meta_device():
        made = Parts()
    give_memory(made, torch.device("cpu"), recurse=False)
    assert not made.fixed.is_meta and made.embedding.weight.is_meta
