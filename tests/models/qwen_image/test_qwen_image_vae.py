"""The VAE of Qwen-Image as a stage runs it, on one frame, against diffusers' module of films."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.qwen_image import random_vae

from vllm_omni.errors import ConfigError
from vllm_omni.models.qwen_image.vae import PictureVae, VaeConfig
from vllm_omni.worker.diffusion.previewer import to_pixels
from vllm_omni.worker.diffusion.tiling import decode_tiles

CPU = torch.device("cpu")
MEAN_DIFFERENCE = 5.0  # of 255, from the whole picture, of random weights in the smallest tiles
MOST_SEAM = 1.5  # times as much as from any other row to the next


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


@pytest.mark.parametrize(("height", "width"), [(24, 40), (29, 17), (16, 52)])
@torch.inference_mode()
def test_a_picture_in_tiles_is_that_of_diffusers_and_its_seams_are_small(height: int, width: int) -> None:
    tile, scale = 16, 8
    reference, ours = random_vae(), PictureVae(random_vae(), CPU)
    latents = torch.randn(8, height, width, generator=torch.Generator().manual_seed(0))
    pieces = torch.cat(list(decode_tiles(ours.decode, latents, tile, scale))).int()
    reference.enable_tiling(tile * scale, tile * scale, tile * scale * 3 // 4, tile * scale * 3 // 4)
    film = (latents * ours._deviation + ours._mean)[None, :, None]
    expected = to_pixels(reference.decode(film).sample[0, :, 0] / 2 + 0.5).int()
    assert (pieces - expected).abs().max() <= 1
    whole = to_pixels(ours.decode(latents)).int()
    assert 0 < (pieces - whole).abs().float().mean() < MEAN_DIFFERENCE
    kept = tile * scale * 3 // 4
    for along in (pieces, pieces.transpose(0, 1)):
        steps = along.diff(dim=0).abs().float().mean(dim=(1, 2))
        seams = steps[kept - 1 :: kept]
        assert (seams < MOST_SEAM * steps.mean()).all(), "a seam is no edge"


@pytest.mark.parametrize(
    ("config", "pixel_bytes"),
    [  # measured on a CPU: the rise of resident memory over a decode, in float32 and in bfloat16
        ({"base_dim": 32, "dim_mult": [1, 2, 4, 4]}, 799),
        ({"base_dim": 32, "dim_mult": [1, 2, 4, 4]}, 696),
        ({"base_dim": 32, "dim_mult": [1, 4, 4, 4]}, 1471),
        ({"base_dim": 32, "dim_mult": [1, 1, 2, 2]}, 762),
    ],
)
def test_what_is_planned_covers_what_was_measured(tmp_path: Path, config: dict[str, Any], pixel_bytes: int) -> None:
    random_vae().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    size = VaeConfig.from_folder(tmp_path).decoding_size()
    assert (size.scale, size.tile) == (8, 128) and pixel_bytes <= size.pixel_bytes <= 1.25 * pixel_bytes


@pytest.mark.parametrize(
    "config", [{"base_dim": 0}, {"base_dim": "x"}, {"dim_mult": [1, 2]}, {"dim_mult": [1, 2, 4, -1]}]
)
def test_widths_that_are_none_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    random_vae().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(ConfigError, match=f"config.json: {next(iter(config))}"):
        VaeConfig.from_folder(tmp_path)
