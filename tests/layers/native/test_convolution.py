"""Convolutions and group norms of pictures equal torch's; a picture depends on no other and on no number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vllm_omni.layers.convolution import Convolution, convolve
from vllm_omni.layers.native import convolution as native
from vllm_omni.layers.picture_norms import GroupNorm, PixelNorm

# Of the exact result's root mean square: in bfloat16 rounding it alone costs 1.7e-3, with what is multiplied 3.2e-3;
# in float32 wide tiles six times as much as others.
DEVIATIONS = {torch.float32: 2e-6, torch.bfloat16: 4.5e-3}
WIDE_DEVIATIONS = {**DEVIATIONS, torch.float32: 5e-6}
BORDER, MORE_THERE = 4, 2  # pixels of a side up to which a picture is mostly border, where more is cancelled
COUNTS, SIDES = st.integers(1, 3), st.integers(1, 19)
DTYPES = st.sampled_from(list(DEVIATIONS))


def channels_last(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def deviation(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@contextmanager
def tiles(*, wide: bool) -> Iterator[dict[torch.dtype, float]]:
    """Deviations that may be. wide: whether tiles of float32 may be."""
    with pytest.MonkeyPatch.context() as patch:
        if not wide:
            patch.setattr(native, "MAX_WIDE", 0)
        yield WIDE_DEVIATIONS if wide else DEVIATIONS


def make(
    inputs: int, outputs: int, dtype: torch.dtype, *, doubled: bool, bias: bool = True
) -> tuple[nn.Conv2d, Convolution]:
    plain = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias).to(dtype).requires_grad_(False)
    found = Convolution.find(plain, doubled=doubled)
    assert found is not None
    return plain, found


@settings(max_examples=40)
@given(COUNTS, SIDES, SIDES, st.sampled_from([16, 32, 48, 80]), st.sampled_from([32, 96]), *[st.booleans()] * 4, DTYPES)
@torch.inference_mode()
def test_convolutions_equal_torchs(
    count: int,
    height: int,
    width: int,
    inputs: int,
    outputs: int,
    doubled: bool,
    has_bias: bool,
    has_residual: bool,
    wide: bool,
    dtype: torch.dtype,
) -> None:
    with tiles(wide=wide) as deviations:
        plain, found = make(inputs, outputs, dtype, doubled=doubled, bias=has_bias)
    scale = 2 if doubled else 1
    x = channels_last(count, inputs, height, width, dtype=dtype)
    residual = channels_last(count, outputs, scale * height, scale * width, dtype=dtype) if has_residual else None
    result = found(x, residual)
    exact = convolve(x.double(), plain.double(), None if residual is None else residual.double(), doubled=doubled)
    assert result.shape == exact.shape and result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert deviation(result, exact) < deviations[dtype] * (MORE_THERE if min(height, width) <= BORDER else 1)


@settings(max_examples=15)
@given(
    COUNTS, st.integers(5, 19), st.integers(5, 19), st.integers(2, 3), st.sampled_from([16, 48]), st.booleans(), DTYPES
)
@torch.inference_mode()
def test_convolutions_of_films_equal_torchs(
    count: int, height: int, width: int, frames: int, inputs: int, wide: bool, dtype: torch.dtype
) -> None:
    x = channels_last(count + frames - 1, inputs, height, width, dtype=dtype)
    weight, bias = torch.randn(32, inputs, frames, 3, 3).to(dtype) / 16, torch.randn(32).to(dtype)
    with tiles(wide=wide) as deviations:
        found = Convolution.of_weight(weight, bias)
    assert found is not None
    film = x.double().transpose(0, 1)[None]
    exact = F.conv3d(film, weight.double(), bias.double(), padding=(0, 1, 1))[0].transpose(0, 1)
    assert deviation(found(x), exact) < deviations[dtype]


@pytest.mark.parametrize("dtype", list(DEVIATIONS))
@pytest.mark.parametrize(("doubled", "wide"), [(False, True), (False, False), (True, False)])
@torch.inference_mode()
def test_a_picture_depends_on_no_other_and_on_no_number_of_threads(
    dtype: torch.dtype, doubled: bool, wide: bool
) -> None:
    with tiles(wide=wide):
        _, found = make(64, 64, dtype, doubled=doubled)
    x = channels_last(5, 64, 33, 47, dtype=dtype)
    together, threads = found(x), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [found(x[i : i + 1]) for i in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.cat(alone))


def test_what_the_kernels_do_not_compute_stays_torchs() -> None:
    kinds: list[nn.Module] = [
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(16, 32, 3, padding=2, dilation=2),
        nn.Conv2d(16, 3, 3, padding=1),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ConvTranspose2d(16, 32, 3, padding=1),
    ]
    assert all(Convolution.find(kind.requires_grad_(False)) is None for kind in kinds)
    assert Convolution.find(nn.Conv2d(16, 32, 3, padding=1)) is None, "its gradient is asked for"
    assert Convolution.find(nn.Conv2d(16, 32, 3, padding=1).half().requires_grad_(False)) is None


@settings(max_examples=40)
@given(
    COUNTS, st.integers(2, 19), SIDES, st.sampled_from([16, 32, 96]), st.sampled_from([1, 4, 8]), st.booleans(), DTYPES
)
@torch.inference_mode()
def test_group_norms_equal_torchs(
    count: int, height: int, width: int, channels: int, groups: int, activated: bool, dtype: torch.dtype
) -> None:
    x = channels_last(count, channels, height, width, dtype=dtype) + 5  # a mean that could cost digits
    norm = GroupNorm.of(nn.GroupNorm(groups, channels).to(dtype).requires_grad_(False), activated=activated)
    norm.weight.copy_(torch.randn(channels)), norm.bias.copy_(torch.randn(channels))
    exact = F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps)
    result = norm(x)
    assert result.is_contiguous(memory_format=torch.channels_last) and result.dtype == dtype
    assert deviation(result, F.silu(exact) if activated else exact) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert torch.equal(result, torch.cat([norm(x[i : i + 1]) for i in range(count)]))


@torch.inference_mode()
def test_group_norms_of_other_memory_are_torchs() -> None:
    norm = GroupNorm.of(nn.GroupNorm(4, 16).requires_grad_(False), activated=True)
    for x in (torch.randn(2, 16, 5, 7), torch.randn(2, 16, 9)):
        torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 4, norm.weight, norm.bias)))


@pytest.mark.parametrize("dtype", list(DEVIATIONS))
@torch.inference_mode()
def test_norms_of_pixels_equal_torchs(dtype: torch.dtype) -> None:
    norm = PixelNorm(torch.randn(48).to(dtype), activated=True)
    film = channels_last(2, 48, 35, 6, dtype=dtype).unflatten(2, (5, 7))
    film[1, :, 2, 3, 4] = 0
    result = norm(film)
    assert result.stride() == film.stride() and not result[1, :, 2, 3, 4].any()
    assert deviation(result, norm.plain(film).double()) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert torch.equal(result[1:], norm(film[1:]))


@torch.inference_mode()
def test_norms_with_weights_of_another_type_are_torchs() -> None:
    """The kernels read weights of the pictures' type alone."""
    x = channels_last(1, 32, 5, 7, dtype=torch.bfloat16)
    norm = GroupNorm.of(nn.GroupNorm(4, 32).requires_grad_(False))
    torch.testing.assert_close(norm(x), F.group_norm(x, 4, norm.weight, norm.bias, norm.eps))
    assert deviation(PixelNorm(torch.ones(32), activated=False)(x), F.normalize(x.double(), dim=1) * 32**0.5) < 4e-3
