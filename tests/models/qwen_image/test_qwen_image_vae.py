"""The VAE of Qwen-Image as a stage runs it, on one frame, against diffusers' module of films."""

from __future__ import annotations

import pytest
import torch
from support.qwen_image import random_vae

from vllm_omni.models.qwen_image.vae import PictureVae

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_halvings", [1, 3])
@pytest.mark.parametrize("size", [(8, 12), (1, 5)])
@torch.inference_mode()
def test_a_frame_alone_is_decoded_as_the_first_of_a_film(num_halvings: int, size: tuple[int, int]) -> None:
    reference, ours = random_vae(num_halvings), PictureVae(random_vae(num_halvings), CPU)
    latents = torch.randn(8, *size, generator=torch.Generator().manual_seed(0))
    mean, deviation = (
        torch.tensor(values)[:, None, None] for values in (reference.config.latents_mean, reference.config.latents_std)
    )
    expected = reference.decode((latents * deviation + mean)[None, :, None]).sample[0, :, 0] / 2 + 0.5
    assert (ours.decode(latents) - expected).abs().max() < 1e-5
    assert expected.std() > 0.01


@torch.inference_mode()
def test_a_picture_is_encoded_as_a_film_of_one_frame() -> None:
    reference, ours = random_vae(), PictureVae(random_vae(), CPU)
    pixels = torch.randint(0, 256, (64, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    film = (pixels.permute(2, 0, 1).float() / 127.5 - 1)[None, :, None]
    found = reference.encode(film).latent_dist
    mean, deviation = (
        torch.tensor(values)[:, None, None] for values in (reference.config.latents_mean, reference.config.latents_std)
    )
    expected = torch.stack([(found.mean[0, :, 0] - mean) / deviation, found.std[0, :, 0] / deviation])
    assert (ours.encode(pixels) - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_weights_that_one_frame_does_not_read_are_not_held() -> None:
    whole, vae = random_vae(), random_vae()
    PictureVae(vae, CPU)
    held, published = (sum(parameter.numel() for parameter in module.parameters()) for module in (vae, whole))
    assert held < published / 2
