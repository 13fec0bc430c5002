"""Packed linear layers equal torch's own, row by row, for every shape and dtype that a stage computes in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_omni.layers.linear import Linear, MergedLinear, pack_linears
from vllm_omni.layers.packing import linear
from vllm_omni.utils.device import multiplies_with_onednn

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(not multiplies_with_onednn(CPU, torch.float32), reason="torch is without oneDNN here")


@given(st.integers(0, 70), st.integers(1, 90), st.integers(1, 90), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_packed_and_plain_products_equal_torchs(
    rows: int, wide: int, narrow: int, bias: bool, is_batched: bool
) -> None:
    layer = Linear(wide, narrow, bias=bias)
    x = torch.randn(2, rows, wide) if is_batched else torch.randn(rows, wide)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), expected, rtol=1e-5, atol=1e-5)
        layer.pack()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_is_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    layer = Linear(96, 160).to(dtype)
    layer.pack()
    x = torch.randn(300, 96, dtype=dtype)
    together = layer(x)
    for rows in (slice(0, 1), slice(7, 9), slice(100, 116), slice(43, 299)):
        assert torch.equal(layer(x[rows]), together[rows])


@needs_onednn
@torch.inference_mode()
def test_packing_keeps_nothing_twice_and_may_be_repeated() -> None:
    layers = torch.nn.Sequential(Linear(32, 64), torch.nn.Linear(64, 48), MergedLinear(48, {"a": 64, "b": 32}))
    x = torch.randn(5, 32)
    expected, size = layers(x), sum(parameter.numel() for parameter in layers.parameters())
    pack_linears(layers)
    packed = layers[0].weight
    pack_linears(layers)
    assert layers[0].packing is not None and layers[1].weight.shape == (48, 64) and layers[0].weight is packed
    assert sum(parameter.numel() for parameter in layers.parameters()) == size
    torch.testing.assert_close(layers(x), expected, rtol=1e-5, atol=1e-5)
    assert [part.shape[1] for part in layers[2].project(torch.randn(3, 48))] == [64, 32]


@torch.inference_mode()
def test_bfloat16_is_torchs_own_where_onednn_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor of x86 with AVX2 alone; the shape is none that the package's kernels take."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": False, "avx512_bw": True})
    layer = Linear(8, 5).to(torch.bfloat16)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    expected = F.linear(x, layer.weight, layer.bias)
    layer.pack()
    assert layer.packing is None and not multiplies_with_onednn(CPU, torch.bfloat16)
    torch.testing.assert_close(layer(x), expected)


@torch.inference_mode()
def test_other_dtypes_stay_as_they_are() -> None:
    layer = Linear(8, 4).to(torch.float64)
    layer.pack()
    assert layer.packing is None and layer(torch.ones(2, 8, dtype=torch.float64)).dtype == torch.float64
