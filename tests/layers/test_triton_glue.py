"""Triton's kernels between the products of a layer equal the operations of torch that they stand for: in the
interpreter, and where there is a GPU on it, in every dtype to the last rounding.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from vllm_omni.layers.heads import HeadShape, placed_heads, placed_rows, plain_placed_heads
from vllm_omni.layers.modulation import (
    Norm,
    gated_sum,
    modulated,
    plain_gated_sum,
    plain_modulated,
    plain_swiglu,
    swiglu,
)
from vllm_omni.layers.norm import LayerNorm, RMSNorm
from vllm_omni.layers.picture_norms import GroupNorm, use_group_norms
from vllm_omni.layers.triton import glue, library

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the kernels run, and every layer takes them."""
    where = CPU if request.param == "interpreter" else request.getfixturevalue("gpu")
    if where == CPU:
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton's interpreter is off where there is a GPU")
        monkeypatch.setattr(library, "is_cuda", lambda device: True)
    yield where


def numbers(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device, dtype)


def assert_rounded_alike(found: Tensor, expected: Tensor) -> None:
    """Within some roundings of the largest: a mean may have been added up in another order."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    is_cut = found.dtype == torch.bfloat16 and found.device == CPU  # the interpreter cuts where it should round
    tolerance = (
        (2 if found.dtype == torch.float16 else 8)
        * torch.finfo(found.dtype).eps
        * max(1.0, float(expected.abs().max()))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    if found.dtype != torch.float32 and not is_cut:
        assert (found != expected).float().mean() < 0.02


def norms(width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Norm]:
    rms = RMSNorm(width, 1e-5).requires_grad_(False)
    rms.weight.data = numbers(width, device=device, dtype=dtype, seed=9)
    return {"rms": rms, "layer": LayerNorm(1e-5)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 2049])
def test_norms_and_sums(width: int, dtype: torch.dtype, device: torch.device) -> None:
    norm = norms(width, device, dtype)["rms"]
    assert isinstance(norm, RMSNorm)
    x, update = (numbers(5, width, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    assert_rounded_alike(norm(x), norm.plain(x))
    total, normed = norm.after_sum(x, update)
    assert_rounded_alike(total, x + update)
    assert_rounded_alike(normed, norm.plain(total))
    strided = numbers(5, 3, width, device=device, dtype=dtype)[:, 1]
    assert_rounded_alike(norm(strided), norm.plain(strided))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("given", ["", "scale", "scale shift"])
def test_modulation(given: str, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    norm = norms(72, device, dtype)[kind]
    x = numbers(3, 5, 72, device=device, dtype=dtype)
    scale, shift, gate = numbers(3, 1, 3 * 72, device=device, dtype=dtype, seed=3).chunk(3, dim=-1)
    given_scale, given_shift = (part if name in given else None for name, part in (("scale", scale), ("shift", shift)))
    expected = plain_modulated(x, norm, given_scale, given_shift)
    assert_rounded_alike(modulated(x, norm, given_scale, given_shift), expected)
    update = numbers(3, 5, 72, device=device, dtype=dtype, seed=4)
    given_gate, given_norm = gate if "scale" in given else None, None if "shift" in given else norm
    expected = plain_gated_sum(x, update, given_gate, given_norm)
    assert_rounded_alike(gated_sum(x, update, given_gate, given_norm), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 1500])
def test_swiglu(width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = numbers(2, 3, 2 * width, device=device, dtype=dtype)
    assert_rounded_alike(swiglu(gate_up), plain_swiglu(gate_up.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("are_neighbours", [True, False])
@pytest.mark.parametrize("heads", [(3, 3, 24), (12, 2, 20)])
def test_heads_of_samples(
    heads: tuple[int, int, int], are_neighbours: bool, has_norms: bool, dtype: torch.dtype, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    pair = _head_norms(head_dim, device, dtype) if has_norms else None
    qkv = numbers(2, 7, (num_heads + 2 * num_kv_heads) * head_dim, device=device, dtype=dtype)
    angles = torch.arange(7.0)[:, None] * torch.rand(head_dim // 2, generator=torch.Generator().manual_seed(1))
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1).to(device)
    shape = HeadShape(num_heads, num_kv_heads, head_dim, are_neighbours)
    expected = plain_placed_heads(qkv.clone(), shape, pair, rope)
    for found, wanted in zip(placed_heads(qkv, shape, pair, rope), expected, strict=True):
        assert_rounded_alike(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [True, False])
def test_heads_of_tokens(
    has_norms: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = _head_norms(16, device, dtype) if has_norms else None
    qkv = numbers(5, (4 + 2 * 2) * 16, device=device, dtype=dtype)
    angles = (torch.arange(5.0)[:, None] * torch.rand(8, generator=torch.Generator().manual_seed(1))).repeat(1, 2)
    cos, sin = (turn[:, None].to(device, dtype) for turn in (angles.cos(), angles.sin()))
    found = placed_rows(qkv.clone(), 4, 2, pair, cos, sin)
    monkeypatch.setattr(library, "is_cuda", lambda device: False)
    for mine, wanted in zip(found, placed_rows(qkv, 4, 2, pair, cos, sin), strict=True):
        assert_rounded_alike(mine, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_go_to_their_slots(dtype: torch.dtype, device: torch.device) -> None:
    cache = torch.full((2, 3, 4, 2, 20), float("nan"), device=device, dtype=dtype)
    states = numbers(5, 8, 20, device=device, dtype=dtype)
    slots = torch.tensor([3, 0, 11, 7, 8], device=device)
    expected = cache.clone()
    for part, given in zip(expected, (states[:, 4:6], states[:, 6:]), strict=True):
        part.view(-1, 2, 20).index_copy_(0, slots, given)
    glue.store_rows(cache, slots, states[:, 4:6], states[:, 6:])
    assert torch.equal(cache.nan_to_num(-7.0), expected.nan_to_num(-7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "groups", "sides"), [(32, 8, (5, 7)), (64, 32, (33, 20)), (512, 32, (6, 3))])
def test_group_norms_of_pictures(
    channels: int, groups: int, sides: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    parts = nn.Sequential(nn.GroupNorm(groups, channels, eps=1e-6)).to(device, dtype).requires_grad_(False)
    parts[0].weight.data, parts[0].bias.data = numbers(2, channels, device=device, dtype=dtype, seed=2)
    x = (5 + numbers(2, channels, *sides, device=device, dtype=dtype)).contiguous(memory_format=torch.channels_last)
    wide = copy.deepcopy(parts).to(CPU, torch.float64)  # torch's own float32 on a CPU is further from that than ours
    expected = wide(x.to(CPU, torch.float64)).to(device, dtype)
    use_group_norms(parts)
    found = parts(x)
    assert type(parts[0]) is GroupNorm and found.is_contiguous(memory_format=torch.channels_last)
    assert_rounded_alike(found, expected)


def _head_norms(head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[RMSNorm, RMSNorm]:
    first, second = (norms(head_dim, device, dtype)["rms"] for _ in range(2))
    assert isinstance(first, RMSNorm) and isinstance(second, RMSNorm)
    second.weight.data = second.weight.data.flip(0)
    return first, second
