"""What the kernels of diffusion transformers compute equals its definition in torch; a sample depends on no other."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_omni.layers import banded
from vllm_omni.layers.band import Band
from vllm_omni.layers.banded import attention, banded_attention, blockwise_attention
from vllm_omni.layers.heads import HeadShape, placed_heads, plain_placed_heads
from vllm_omni.layers.linear import ACTIVATIONS, MergedLinear, quantize_linears
from vllm_omni.layers.modulation import (
    Norm,
    gated_sum,
    gelu,
    modulated,
    plain_gated_sum,
    plain_modulated,
    plain_swiglu,
    swiglu,
)
from vllm_omni.layers.native import library
from vllm_omni.layers.native.packed import Activation, NativePacking
from vllm_omni.layers.norm import LayerNorm, RMSNorm
from vllm_omni.layers.snake import filtered_snake, low_pass_taps, plain_filtered_snake, snake

ROOT = Path(__file__).resolve().parents[3]
DTYPES = (torch.float32, torch.bfloat16)
NORMS = ("rms", "centred")
SAMPLES, LENGTHS, WIDTHS = st.integers(1, 4), st.integers(1, 70), st.integers(1, 90) | st.sampled_from([64, 256])


def close(result: Tensor, expected: Tensor, steps: float = 2.0) -> None:
    """bfloat16: to `steps` of its 8 bits, since the plain path rounds in between."""
    tolerance = 2e-5 if result.dtype == torch.float32 else steps * 2**-7
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def make_norm(kind: str, width: int, dtype: torch.dtype) -> Norm:
    if kind == "centred":
        return LayerNorm(1e-6)
    norm = RMSNorm(width, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(1 + 0.3 * torch.randn(width))
    return norm


def vectors(count: int, samples: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Of every sample, as a layer gives them: cut out of one product."""
    return list((0.5 * torch.randn(samples, count * width)).to(dtype)[:, None].chunk(count, dim=-1))


@settings(max_examples=40)
@given(SAMPLES, LENGTHS, WIDTHS, st.sampled_from(NORMS), st.integers(0, 2), st.sampled_from(DTYPES))
@torch.inference_mode()
def test_modulated_norms_equal_torchs(
    samples: int, length: int, width: int, kind: str, num_vectors: int, dtype: torch.dtype
) -> None:
    x = torch.randn(samples, length, width).to(dtype)
    given = vectors(2, samples, width, dtype)[:num_vectors]
    scale, shift = (*given, None, None)[:2]
    norm = make_norm(kind, width, dtype)
    close(modulated(x, norm, scale, shift), plain_modulated(x, norm, scale, shift))


@settings(max_examples=40)
@given(SAMPLES, LENGTHS, WIDTHS, st.sampled_from((*NORMS, None)), st.booleans(), st.sampled_from(DTYPES))
@torch.inference_mode()
def test_gated_sums_equal_torchs(
    samples: int, length: int, width: int, kind: str | None, has_gate: bool, dtype: torch.dtype
) -> None:
    x, update = torch.randn(2, samples, length, width).to(dtype)
    gate = vectors(3, samples, width, dtype)[1] if has_gate else None
    norm = None if kind is None else make_norm(kind, width, dtype)
    close(gated_sum(x, update, gate, norm), plain_gated_sum(x, update, gate, norm))


@settings(max_examples=20)
@given(LENGTHS, st.integers(1, 1200), st.sampled_from(DTYPES))
@torch.inference_mode()
def test_gated_activations_equal_torchs(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (3 * torch.randn(rows, 2 * width)).to(dtype)
    close(swiglu(gate_up), plain_swiglu(gate_up))


@settings(max_examples=20)
@given(LENGTHS, st.integers(1, 1200), st.sampled_from(DTYPES), st.sampled_from([1.0, 10.0]))
@torch.inference_mode()
def test_gelu_equals_torchs(rows: int, width: int, dtype: torch.dtype, spread: float) -> None:
    x = (spread * torch.randn(rows, width)).to(dtype)
    close(gelu(x), F.gelu(x, approximate="tanh"), steps=1)
    edges = torch.tensor([0.0, -0.0, 40.0, -40.0, math.inf, math.nan], dtype=dtype)
    torch.testing.assert_close(gelu(edges), F.gelu(edges, approximate="tanh"), equal_nan=True)


NUMBERS = [(dtype, held) for dtype in DTYPES for held in (None, "int8")] + [(torch.float32, "bfloat16")]


def packed_pair(width: int, activation: Activation, numbers: tuple[torch.dtype, str | None]) -> list[MergedLinear]:
    """The same weights, with the activation and without."""
    dtype, held = numbers
    parts = {"others": width - 2 * (width // 3), "gate": width // 3, "up": width // 3}
    layers = [MergedLinear(64, parts, True, can_quantize=True, activation=each) for each in (activation, None)]
    published, bias = torch.randn(width, 64).to(dtype), torch.randn(width).to(dtype)
    for layer in layers:
        layer.to(dtype).requires_grad_(False)
        if held is not None:
            quantize_linears(layer, held)
        layer.fill(slice(None), published, None)
        layer.bias.copy_(bias)
        layer.pack()
        assert isinstance(layer.packing, NativePacking)
    return layers


@settings(max_examples=20)
@given(LENGTHS, st.sampled_from([96, 192, 384]), st.sampled_from(["gelu", "swiglu"]), st.sampled_from(NUMBERS))
@torch.inference_mode()
def test_activations_within_a_product_are_the_same_behind_it(
    rows: int, width: int, activation: Activation, numbers: tuple[torch.dtype, str | None]
) -> None:
    """Also where the halves of a product are no whole panels."""
    activated, plain = packed_pair(width, activation, numbers)
    x = torch.randn(rows, 64).to(numbers[0])
    assert torch.equal(activated(x), ACTIVATIONS[activation](plain(x)))


@settings(max_examples=20)
@given(LENGTHS, st.sampled_from([80, 96, 144, 192]), st.sampled_from(NUMBERS))
@torch.inference_mode()
def test_gates_beside_other_projections_are_the_same_alone(
    rows: int, width: int, numbers: tuple[torch.dtype, str | None]
) -> None:
    _, layer = packed_pair(2 * width, "gelu", numbers)
    x = torch.randn(rows, 64).to(numbers[0])
    others, gated = layer.project_beside(x)
    plain = layer(x)
    assert others.is_contiguous() and torch.equal(others, plain[:, : others.shape[1]])
    assert torch.equal(gated, swiglu(plain[:, others.shape[1] :]))


@settings(max_examples=40)
@given(
    *(SAMPLES, LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 33) | st.sampled_from([16, 64])),
    *(st.booleans(), st.booleans(), st.sampled_from([None, 1]), st.sampled_from(DTYPES)),
)
@torch.inference_mode()
def test_heads_are_normed_and_turned_as_by_torch(
    samples: int,
    length: int,
    kv_heads: int,
    group: int,
    half: int,
    neighbours: bool,
    has_norms: bool,
    num_turned: int | None,
    dtype: torch.dtype,
) -> None:
    shape = HeadShape(kv_heads * group, kv_heads, 2 * half, neighbours, num_turned)
    qkv = torch.randn(samples, length, (group + 2) * kv_heads * 2 * half).to(dtype)
    angles = torch.randn(length, half)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    norms = (RMSNorm(2 * half, 1e-5).to(dtype), RMSNorm(2 * half, 1e-5).to(dtype)) if has_norms else None
    for norm in norms or ():
        norm.weight.copy_(1 + 0.3 * torch.randn(2 * half))
    expected = plain_placed_heads(qkv.clone(), shape, norms, rope)
    for found, definition in zip(placed_heads(qkv, shape, norms, rope), expected, strict=True):
        close(found, definition)


def attend_in_float64(query: Tensor, key: Tensor, value: Tensor, band: Band | None) -> Tensor:
    """The definition of attention: [B, H, q, d], [B, K, k, d] twice -> [B, H, q, d]."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * query.shape[3] ** -0.5
    if band is not None:
        block = (torch.arange(scores.shape[2]) + band.offset) // band.block
        distance = block - block[:, None]
        scores = scores.masked_fill((distance < -band.back) | (distance > band.ahead), -math.inf)
    return (scores.softmax(dim=-1) @ values).to(query.dtype)


def heads_of(
    samples: int, length: int, num_heads: int, num_kv_heads: int, size: int, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, keys and values as they stand in one projection, [B, heads, length, size]."""
    qkv = torch.randn(samples, length, num_heads + 2 * num_kv_heads, size).to(dtype).transpose(1, 2)
    return list(qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [((2, 2), 32), ((6, 2), 32), ((16, 1), 32), ((2, 2), 512)])
@pytest.mark.parametrize(("samples", "length"), [(1, 1), (3, 33), (1, 700)])
@torch.inference_mode()
def test_full_attention_equals_its_definition(
    dtype: torch.dtype, heads: tuple[int, int], size: int, samples: int, length: int
) -> None:
    query, key, value = heads_of(samples, length, *heads, size, dtype)
    close(attention(query, key, value), attend_in_float64(query, key, value, None), steps=1)
    key, value = (part[:, :, : length // 2 + 1] for part in (key, value))  # fewer are read than ask
    close(attention(query, key, value), attend_in_float64(query, key, value, None), steps=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 40, 128, 1000])
@pytest.mark.parametrize("length", [2, 90, 700])
@torch.inference_mode()
def test_windows_hide_what_is_far(dtype: torch.dtype, window: int, length: int) -> None:
    query, key, value = heads_of(2, length, 4, 2, 32, dtype)
    band = Band.window(window)
    close(banded_attention(query, key, value, band), attend_in_float64(query, key, value, band), steps=1)


@settings(max_examples=60)
@given(
    *(st.integers(0, 2), st.integers(0, 2), st.integers(1, 70), st.data(), st.integers(1, 200)),
    *(st.sampled_from(DTYPES), st.integers(0, 10**6)),
)
@torch.inference_mode()
def test_bands_of_blocks_hide_the_other_blocks(
    back: int, ahead: int, block: int, data: st.DataObject, length: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    band = Band(back, ahead, block, data.draw(st.integers(0, block - 1)))
    query, key, value = heads_of(2, length, 2, 2, 32, dtype)
    expected = attend_in_float64(query, key, value, band)
    close(banded_attention(query, key, value, band), expected, steps=1)
    close(blockwise_attention(query, key, value, band), expected, steps=1)
    reach = [(band.first(at), band.stop(at)) for at in range(length)]
    assert band.covers(length) == all(first <= 0 and stop >= length for first, stop in reach)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
@torch.inference_mode()
def test_a_sample_is_the_same_alone_and_among_others(dtype: torch.dtype, window: int | None) -> None:
    width, norm = 4 * 64, make_norm("rms", 4 * 64, dtype)
    x, (scale, shift) = torch.randn(3, 130, width).to(dtype), vectors(2, 3, width, dtype)
    heads = heads_of(3, 130, 4, 2, 64, dtype)

    def run(chosen: slice) -> tuple[Tensor, Tensor, Tensor]:
        normed = modulated(x[chosen], norm, scale[chosen], shift[chosen])
        query, key, value = (part[chosen] for part in heads)
        attended = attention(query, key, value)
        if window is not None:
            attended = banded_attention(query, key, value, Band.window(window))
        return normed, gated_sum(normed, normed, scale[chosen], norm), attended

    together = run(slice(0, 3))
    for sample in range(3):
        for alone, among_others in zip(run(slice(sample, sample + 1)), together, strict=True):
            assert torch.equal(alone[0], among_others[sample])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_what_is_no_number_is_not_hidden_by_attention(dtype: torch.dtype) -> None:
    query, key, value = heads_of(1, 80, 2, 2, 32, dtype)
    key[0, 0, 70, 3] = math.nan
    attended = attention(query, key, value)
    assert attended[0, 0].isnan().all() and attended[0, 1].isfinite().all()


def test_heads_that_kernels_do_not_take_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "attend_fully", None)
    query, key, value = heads_of(1, 40, 2, 2, 24, torch.float32)
    close(attention(query, key, value), attend_in_float64(query, key, value, None))


@settings(max_examples=40)
@given(
    *(st.integers(1, 2), st.integers(1, 40), st.integers(1, 9000) | st.integers(1, 90), st.booleans()),
    *(st.sampled_from(DTYPES), st.sampled_from([1.0, 30.0])),
)
@torch.inference_mode()
def test_periodic_activations_equal_their_definition(
    rows: int, channels: int, length: int, channels_last: bool, dtype: torch.dtype, spread: float
) -> None:
    x = (spread * torch.randn(rows, channels, length)).to(dtype)
    frequency, amplitude = torch.rand(2, channels).add(0.1).to(dtype)
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    sine = (x.double() * frequency[:, None].double()).sin()
    expected = (x.double() + amplitude[:, None].double() * sine.square()).to(dtype)
    found = snake(x, frequency, amplitude)
    assert found.stride() == x.stride()
    close(found, expected, steps=1)


@settings(max_examples=40)
@given(
    *(st.integers(1, 2), st.integers(1, 40), st.integers(1, 3000) | st.integers(1, 9)),
    *(st.sampled_from(DTYPES), st.integers(0, 10**6)),
)
@torch.inference_mode()
def test_filtered_activations_equal_their_definition(
    rows: int, channels: int, length: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (3 * torch.randn(rows, channels, length)).to(dtype)
    frequency, amplitude = torch.rand(2, channels).add(0.1).to(dtype)
    given = [part.double() for part in (x, frequency, amplitude, low_pass_taps())]
    close(filtered_snake(x, frequency, amplitude, low_pass_taps()), plain_filtered_snake(*given).to(dtype), steps=1)


def test_what_is_differentiated_goes_past_the_kernels() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(2, 3, 64), torch.randn(2, 1, 64, requires_grad=True)
    modulated(x, RMSNorm(64, 1e-5), scale).sum().backward()
    assert scale.grad is not None and scale.grad.abs().min() > 0


# In a process of its own: calls that count the lines of the package are nothing that torch can trace.
TRACED = """
import sys
from pathlib import Path

import torch

from vllm_omni.layers.modulation import modulated, plain_modulated, plain_swiglu, swiglu
from vllm_omni.layers.linear import ACTIVATIONS, MergedLinear, quantize_linears
from vllm_omni.layers.native import library
from vllm_omni.layers.native.packed import Activation, NativePacking
from vllm_omni.layers.norm import RMSNorm

library.built_variants = lambda: {sys.argv[1]: Path(sys.argv[2])}
x, norm = torch.randn(2, 3, 64), RMSNorm(64, 1e-5)
with torch.inference_mode():
    assert library.kernels_for(x) is not None, "untraced, the kernels take it"
traced = torch.compile(lambda x: swiglu(modulated(x, norm)), backend="eager")
with torch.inference_mode():
    torch.testing.assert_close(traced(x), plain_swiglu(plain_modulated(x, norm, None, None)))
"""


def test_what_is_traced_goes_past_the_kernels(variant: str) -> None:
    command = [sys.executable, "-c", TRACED, variant, str(library.built_variants()[variant])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
