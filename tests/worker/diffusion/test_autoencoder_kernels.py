"""Autoencoders with the package's kernels in the place of diffusers' parts give what diffusers' give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support.dit
import support.qwen_image
import support.wan
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from vllm_omni.layers.convolution import Convolution
from vllm_omni.layers.native import library
from vllm_omni.layers.picture_norms import PixelNorm
from vllm_omni.models.qwen_image.vae import PictureVae
from vllm_omni.models.wan.vae import FilmVae
from vllm_omni.models.z_image.spec import ZImageSpec
from vllm_omni.worker.diffusion import film_autoencoder, picture_autoencoder
from vllm_omni.worker.diffusion.picture_autoencoder import PictureAttention, ResidualBlock

CPU = torch.device("cpu")
WIDTHS = (32, 64)  # of which the kernels take all
MOST_LOST_DB = 4.0  # of bfloat16, beside what diffusers' parts lose in it; 1.4 to 2.4 with published shapes


@pytest.fixture(autouse=True)
def kernels_are_there() -> Iterator[None]:
    if not library.built_variants():
        pytest.skip("no kernels are built for this processor")
    with torch.inference_mode():
        yield


def count(module: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(part, kinds) for part in module.modules())


def picture_vae(dtype: torch.dtype, *, has_kernels: bool) -> Any:
    vae = support.dit.random_vae(WIDTHS).to(dtype=dtype, memory_format=torch.channels_last)
    if has_kernels:
        picture_autoencoder.use_kernels(vae)
    return vae


def decibels(result: Tensor, exact: Tensor) -> float:
    return float(20 * torch.log10(exact.norm() / (result.float() - exact).norm()))


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 12)])
def test_pictures_are_those_of_diffusers(size: tuple[int, int]) -> None:
    plain, ours = (picture_vae(torch.float32, has_kernels=value) for value in (False, True))
    latents = torch.randn(2, 16, *size)
    torch.testing.assert_close(ours.decode(latents).sample, plain.decode(latents).sample, rtol=0, atol=2e-5)
    pixels = torch.rand(2, 3, 2 * size[0], 2 * size[1]) * 2 - 1
    moments = [vae.encode(pixels).latent_dist.parameters for vae in (ours, plain)]
    torch.testing.assert_close(*moments, rtol=0, atol=2e-5)


def test_every_block_of_a_picture_is_replaced() -> None:
    plain, ours = (picture_vae(torch.float32, has_kernels=value) for value in (False, True))
    assert count(plain, ResnetBlock2D) == count(ours, ResidualBlock) and not count(ours, ResnetBlock2D)
    assert count(plain, Upsample2D) == 1 and not count(ours, Upsample2D)
    assert count(plain, Attention) == count(ours, PictureAttention) == 2 and not count(ours, Attention)


def test_bfloat16_loses_little_more_than_diffusers_parts_do() -> None:
    latents = torch.randn(1, 16, 24, 24)
    exact = picture_vae(torch.float32, has_kernels=False).decode(latents).sample
    plain, ours = (
        decibels(picture_vae(torch.bfloat16, has_kernels=value).decode(latents.bfloat16()).sample, exact)
        for value in (False, True)
    )
    assert ours > plain - MOST_LOST_DB


def test_a_block_that_is_more_stays_diffusers() -> None:
    kinds = (
        dict(temb_channels=8),
        dict(temb_channels=None, up=True),
        dict(temb_channels=None, output_scale_factor=2.0),
    )
    for kind in (*kinds, dict(temb_channels=None, non_linearity="mish")):
        block = ResnetBlock2D(in_channels=32, groups=8, **kind).requires_grad_(False)
        assert ResidualBlock.find(block) is None, kind
    assert ResidualBlock.find(ResnetBlock2D(in_channels=32, groups=8, temb_channels=None).requires_grad_(False))


def test_attention_that_is_more_stays_diffusers() -> None:
    own: dict[str, Any] = dict(
        query_dim=64, heads=2, dim_head=32, norm_num_groups=8, residual_connection=True, bias=True
    )
    x = torch.randn(2, 64, 5, 7).contiguous(memory_format=torch.channels_last)
    plain = Attention(**own).requires_grad_(False)
    found = PictureAttention.find(plain)
    assert found is not None
    torch.testing.assert_close(found(x), plain(x), rtol=0, atol=2e-5)
    kinds = (dict(qk_norm="layer_norm"), dict(residual_connection=False), dict(rescale_output_factor=2.0))
    for kind in (*kinds, dict(norm_num_groups=None), dict(cross_attention_dim=32), dict(spatial_norm_dim=16)):
        assert PictureAttention.find(Attention(**{**own, **kind}).requires_grad_(False)) is None, kind


@pytest.mark.parametrize("is_residual", [False, True])
def test_films_are_those_of_diffusers(is_residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three frames of latents, of which each reads what the convolutions kept of those before it."""
    ours = FilmVae(support.wan.random_vae(is_residual, base_dim=32), CPU)
    assert count(ours._module, Convolution) > 20 and count(ours._module, PixelNorm) > 10
    assert count(ours._module, film_autoencoder.CausalConvolution) > 20
    with monkeypatch.context() as patch:
        patch.setattr(library, "built_variants", dict)
        plain = FilmVae(support.wan.random_vae(is_residual, base_dim=32), CPU)
    assert not count(plain._module, Convolution, PixelNorm)
    latents = torch.randn(support.wan.CHANNELS, 3, 4, 5)
    found, expected = (torch.cat(list(vae._decoded(latents)), dim=1) for vae in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert expected.shape[1] == 9 and expected.std() > 0.01
    pixels = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8)
    torch.testing.assert_close(ours.encode(pixels), plain.encode(pixels), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frame_of_a_film_is_that_of_diffusers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = PictureVae(support.qwen_image.random_vae(base_dim=32).to(dtype), CPU)
    assert count(ours._module, Convolution) > 15 and count(ours._module, PixelNorm) > 10
    monkeypatch.setattr(library, "built_variants", dict)
    plain, exact = (
        PictureVae(support.qwen_image.random_vae(base_dim=32).to(kind), CPU) for kind in (dtype, torch.float32)
    )
    latents = torch.randn(8, 7, 6)
    expected = exact.decode(latents)
    assert expected.std() > 0.01
    if dtype == torch.float32:
        torch.testing.assert_close(ours.decode(latents), expected, rtol=0, atol=2e-5)
    else:
        assert decibels(ours.decode(latents), expected) > decibels(plain.decode(latents), expected) - MOST_LOST_DB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_packing_holds_is_planned(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support.dit.random_pipeline(tmp_path)
    support.dit.random_vae(WIDTHS).save_pretrained(tmp_path / "vae")
    spec = ZImageSpec(tmp_path)
    held = sum(parameter.nbytes for parameter in picture_vae(dtype, has_kernels=True).parameters())
    published = sum(parameter.nbytes for parameter in picture_vae(dtype, has_kernels=False).parameters())
    assert published < held <= published + spec.packing_bytes(dtype) < 1.2 * held
    monkeypatch.setattr(library, "built_variants", dict)
    assert spec.packing_bytes(dtype) == 0
