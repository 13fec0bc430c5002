"""Weights in int8: what they stand for, what a product with them is, and that rows depend on no others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_omni.layers.linear import Embedding, Linear, pack_linears, quantize_linears
from vllm_omni.layers.packing import PlainQuantized
from vllm_omni.layers.quantization import dequantize, multiply_quantized, quantize_weight


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 2100), st.integers(0, 9))
def test_numbers_are_within_half_a_step_of_what_they_stand_for(rows: int, inputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, inputs) * torch.rand(rows, 1)
    numbers, scales = quantize_weight(weight)
    assert numbers.dtype == torch.int8 and numbers.abs().amax(dim=1).eq(127).all()
    assert ((dequantize(numbers, scales) - weight).abs() <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("inputs", [3, 1024, 3000])
def test_a_product_of_the_largest_numbers_is_exact(inputs: int) -> None:
    x = torch.full((2, inputs), 3.0)
    weight, scales = torch.full((4, inputs), 127, dtype=torch.int8), torch.tensor([1.0, 0.5, 0.25, 2.0])
    expected = torch.tensor(127.0 * 127 * inputs) * (torch.tensor(3.0) / 127 * scales)
    assert torch.equal(multiply_quantized(x, weight, scales, None), expected.expand(2, 4))


def test_a_row_is_the_same_alone_and_among_others() -> None:
    weight, scales = quantize_weight(torch.randn(40, 96))
    x = torch.randn(30, 96) * torch.rand(30, 1) * 100
    together = multiply_quantized(x, weight, scales, None)
    assert torch.equal(multiply_quantized(x[7:9], weight, scales, None), together[7:9])


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nothing_finite_and_spoils_no_other(odd: float) -> None:
    weight, scales = quantize_weight(torch.randn(8, 12))
    x = torch.randn(3, 12)
    expected = multiply_quantized(x, weight, scales, None)
    x[1, 5] = odd
    product = multiply_quantized(x, weight, scales, None)
    assert not product[1].isfinite().any()
    assert torch.equal(product[[0, 2]], expected[[0, 2]])


def test_rows_of_zeros_and_of_the_smallest_numbers_give_zeros() -> None:
    weight, scales = quantize_weight(torch.zeros(2, 8))
    assert torch.equal(
        multiply_quantized(torch.tensor([[0.0] * 8, [1e-40] * 8]), weight, scales, None), torch.zeros(2, 2)
    )


def test_only_layers_that_can_are_quantised() -> None:
    with torch.device("meta"):
        model = torch.nn.ModuleList(
            [
                *(Linear(8, 32), Linear(8, 32, can_quantize=True)),
                *(Linear(8, 33, can_quantize=True), Linear(9, 32, can_quantize=True)),  # which no kernel takes
                *(Embedding(32, 8, is_head=False), Embedding(32, 8, is_head=True)),
            ]
        ).to(torch.bfloat16)
    quantize_linears(model)
    dtypes = [layer.weight.dtype for layer in model]
    assert [dtype == torch.int8 for dtype in dtypes] == [False, True, False, False, False, True]
    assert [None if layer.scales is None else layer.scales.dtype for layer in model] == [
        torch.float32 if dtype == torch.int8 else None for dtype in dtypes
    ]


def test_layers_that_can_are_held_in_bfloat16_beside_float32() -> None:
    with torch.device("meta"):
        layers = [Linear(8, 32), Linear(8, 32, can_quantize=True), Embedding(32, 8, is_head=True)]
        model = torch.nn.ModuleList([*layers, Embedding(33, 7, is_head=False)])
    quantize_linears(model, "bfloat16")
    assert [layer.weight.dtype for layer in model] == [torch.float32, *[torch.bfloat16] * 3]
    assert all(layer.scales is None and layer.input_dtype == torch.float32 for layer in model)


@pytest.mark.parametrize("with_kernels", [True, False])
@torch.inference_mode()
def test_a_layer_that_is_held_in_bfloat16_multiplies_in_float32(
    with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_omni.layers.native import library

    if not with_kernels:
        monkeypatch.setattr(library, "built_variants", dict)
    layer, embedding = Linear(8, 32, can_quantize=True), Embedding(32, 8, is_head=True)
    looked_up = Embedding(32, 8, is_head=False)
    published = torch.randn(32, 8).bfloat16()
    for part in (layer, embedding, looked_up):
        quantize_linears(part, "bfloat16")
        part.fill(slice(None), published, None)
        pack_linears(part)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, published.float(), layer.bias))
    torch.testing.assert_close(embedding.compute_logits(x), x @ published.float().T)
    for part in (embedding, looked_up):
        assert torch.equal(part(torch.arange(32)), published.float())


def test_rows_of_quantised_embeddings_are_those_that_the_head_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.layers.native import library

    monkeypatch.setattr(library, "built_variants", dict)
    with torch.device("meta"):
        embedding = Embedding(32, 8, is_head=True)
    quantize_linears(embedding)
    embedding.to_empty(device="cpu")
    published = torch.randn(32, 8)
    embedding.fill(slice(0, 32), published, None)
    pack_linears(embedding)
    assert isinstance(embedding.packing, PlainQuantized)
    rows = embedding(torch.arange(32))
    assert torch.equal(rows, dequantize(*quantize_weight(published)))
    torch.testing.assert_close(embedding.compute_logits(rows), rows @ rows.T, rtol=0.05, atol=0.1)
