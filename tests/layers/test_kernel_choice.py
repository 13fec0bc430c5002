"""What is said of the kernels is what runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_omni.layers import kernel_choice
from vllm_omni.layers import linear as linear_module
from vllm_omni.layers.kernel_choice import kernels_of
from vllm_omni.layers.linear import Linear, pack_linears
from vllm_omni.layers.native import library
from vllm_omni.layers.native.packed import NativePacking
from vllm_omni.layers.packing import OneDNNPacking


def make_linears() -> nn.Module:
    return nn.Sequential(Linear(64, 64, bias=False), nn.SiLU(), Linear(64, 32, bias=False)).requires_grad_(False)


def test_what_is_not_packed_is_multiplied_by_torch() -> None:
    found = kernels_of([make_linears()])
    assert found == {"products": "torch", "kernels": next(iter(kernel_choice.built_variants()), "none")}
    assert kernels_of([nn.SiLU()])["products"] == "torch"


def test_packed_layers_name_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.built_variants():
        pytest.skip("no kernels are compiled")
    packed = make_linears()
    monkeypatch.setattr(linear_module, "find_packing", NativePacking.find)
    pack_linears(packed)
    assert kernels_of([packed])["products"] == "native"
    assert kernels_of([packed, make_linears()])["products"] == "native, torch"
    other = Linear(64, 64, bias=False)
    other.packing = OneDNNPacking()
    assert kernels_of([packed, other])["products"] == "native, onednn"
    x = torch.ones(1, 64)
    assert packed(x).shape == (1, 32)
