"""When previews come, what they show, and which map is read for which VAE."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from vllm_omni.errors import CheckpointError
from vllm_omni.worker.diffusion.preview_map import FLUX_1, VIDEO, VIDEO_VAE, PreviewMap, num_pairs
from vllm_omni.worker.diffusion.previewer import (
    MAX_DECODED_SIDE,
    Colours,
    Previewer,
    flow_estimate,
    preview_steps,
    to_pixels,
)

CPU = torch.device("cpu")
PUBLISHED = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "block_out_channels": [128, 256, 512, 512],
}


# Steps


def test_previews_are_spread_before_the_last_step() -> None:
    for num_previews, num_steps in itertools.product(range(11), range(1, 61)):
        steps = preview_steps(num_previews, num_steps)
        assert len(steps) == min(num_previews, num_steps - 1)
        assert list(steps) == sorted(set(steps)) and all(0 < step < num_steps for step in steps)
        assert not steps or num_steps == 2 or steps[0] < num_steps / 2
        gaps = [after - before for before, after in zip((0, *steps), (*steps, num_steps), strict=True)]
        assert not steps or max(gaps) - min(gaps) <= 2, "evenly"


def test_the_usual_previews_come_where_one_expects_them() -> None:
    assert preview_steps(0, 9) == preview_steps(3, 1) == ()
    assert preview_steps(3, 9) == (2, 4, 6) and preview_steps(1, 50) == (24,) and preview_steps(9, 4) == (1, 2, 3)


# Estimates


def test_on_a_straight_way_every_step_knows_its_end() -> None:
    noise, clean = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).unbind()
    for sigmas, at in ((torch.tensor([1.0, 0.7, 0.2, 0.0]), 0.0), (torch.tensor([0.0, 0.3, 0.8, 1.0]), 1.0)):
        velocity = (noise - clean) if at == 0.0 else (clean - noise)
        for step, sigma in enumerate(sigmas[:-1].tolist()):
            share = sigma if at == 0.0 else 1 - sigma
            latents = share * noise + (1 - share) * clean
            torch.testing.assert_close(flow_estimate(sigmas, step, latents, velocity), clean, rtol=0, atol=1e-5)


# Maps


def random_map(channels: int, with_products: bool) -> PreviewMap:
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> tuple[tuple[float, ...], ...]:
        return tuple(map(tuple, (torch.randn(count, 3, generator=generator) * 0.1).tolist()))

    products = rows(num_pairs(channels)) if with_products else ()
    return PreviewMap(rows(channels), (0.1, 0.5, 0.9), products)


@pytest.mark.parametrize("with_products", [False, True])
def test_a_colour_is_the_sum_that_the_map_says(with_products: bool) -> None:
    found, latents = random_map(4, with_products), torch.randn(4, 2, 3)
    got = Colours(found, CPU)(latents)
    pairs = [(i, j) for i in range(4) for j in range(i, 4)] if with_products else []
    for row in range(2):
        for column in range(3):
            z = latents[:, row, column].tolist()
            for colour in range(3):
                expected = found.bias[colour]
                expected += sum(value * found.factors[channel][colour] for channel, value in enumerate(z))
                expected += sum(z[i] * z[j] * found.products[n][colour] for n, (i, j) in enumerate(pairs))
                assert got[colour, row, column].item() == pytest.approx(expected, abs=1e-5)


def no_decoder(latents: Tensor) -> Tensor:
    pytest.fail("the VAE ran")


def test_a_preview_by_a_map_has_the_size_of_the_picture_and_runs_no_vae() -> None:
    show = Previewer(random_map(4, True), no_decoder, 8, CPU)
    picture = show(torch.randn(4, 12, 20))
    assert picture.dtype is torch.uint8 and picture.shape == (96, 160, 3)
    flat = torch.randn(4, 1, 1).expand(4, 5, 7)
    expected = to_pixels(Colours(random_map(4, True), CPU)(flat))[0, 0]
    assert (show(flat) == expected).all(), "a plain colour stays one"


def test_without_a_map_the_vae_sees_few_latents_and_their_shape_is_kept() -> None:
    seen: list[tuple[int, ...]] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(tuple(latents.shape))
        return torch.nn.functional.interpolate(latents[None, :3], scale_factor=8)[0]

    show = Previewer(None, decode, 8, CPU)
    assert show(torch.zeros(4, 128, 64)).shape == (1024, 512, 3)
    assert show(torch.zeros(4, 16, 8)).shape == (128, 64, 3)
    assert show(torch.zeros(4, 2, 500)).shape == (16, 4000, 3)
    assert seen == [(4, MAX_DECODED_SIDE, MAX_DECODED_SIDE // 2), (4, 16, 8), (4, 1, MAX_DECODED_SIDE)]


def test_latents_that_are_not_finite_still_give_a_picture() -> None:
    latents = torch.zeros(4, 2, 2)
    latents[0, 0] = torch.tensor([float("nan"), float("inf")])
    assert Previewer(random_map(4, True), no_decoder, 8, CPU)(latents).shape == (16, 16, 3)


# Files


def vae_folder(folder: Path, config: dict[str, Any], preview: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if preview is not None:
        (folder / "preview.json").write_text(json.dumps(preview))
    return folder


def test_the_known_map_is_for_the_published_vae_alone(tmp_path: Path) -> None:
    assert PreviewMap.of_vae(vae_folder(tmp_path, PUBLISHED)) is FLUX_1
    assert len(FLUX_1.factors) == 16 and all(len(row) == 3 for row in FLUX_1.factors)
    for key, value in {
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512],
        "_class_name": "AutoencoderTiny",
    }.items():
        assert PreviewMap.of_vae(vae_folder(tmp_path, {**PUBLISHED, key: value})) is None, key
        assert PreviewMap.of_vae(vae_folder(tmp_path, {k: v for k, v in PUBLISHED.items() if k != key})) is None, key


def test_the_map_of_wans_vae_is_found_by_the_scales_of_its_latents(tmp_path: Path) -> None:
    """Which are the defaults of diffusers' class."""
    config = {"_class_name": "AutoencoderKLQwenImage", "z_dim": 16, "latents_mean": list(VIDEO_VAE["latents_mean"])}
    defaults = inspect.signature(AutoencoderKLQwenImage).parameters
    assert config["latents_mean"] == list(defaults["latents_mean"].default)
    assert PreviewMap.of_vae(vae_folder(tmp_path, config)) is VIDEO
    assert len(VIDEO.factors) == 16 and all(len(row) == 3 for row in VIDEO.factors)
    assert PreviewMap.of_vae(vae_folder(tmp_path, {**config, "latents_mean": [0.0] * 16})) is None
    own = {"factors": [[0.1, 0.2, 0.3]] * 16, "bias": [0, 1, 0.5]}
    assert PreviewMap.of_vae(vae_folder(tmp_path, config, own)) == PreviewMap.from_dict(own, 16, "")


def test_a_map_beside_the_vae_comes_before_the_known_one(tmp_path: Path) -> None:
    own = {"factors": [[0.1, 0.2, 0.3]] * 16, "bias": [0, 1, 0.5]}
    found = PreviewMap.of_vae(vae_folder(tmp_path, PUBLISHED, own))
    assert found == PreviewMap(((0.1, 0.2, 0.3),) * 16, (0.0, 1.0, 0.5))


GOOD = {"factors": [[0.1, 0.2, 0.3]] * 2, "bias": [0.5, 0.5, 0.5], "products": [[0, 0, 0]] * 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factors": None}, "factors: got None, expected 2"),
        ({"factors": [[0.1, 0.2, 0.3]]}, "factors: got 1 rows, expected 2"),
        ({"factors": [[0.1, 0.2, 0.3], [0.1, 0.2]]}, r"factors\[1\]: got \[0.1, 0.2\], expected three numbers"),
        ({"factors": [[0.1, 0.2, 0.3], [0.1, 0.2, "x"]]}, r"factors\[1\]: got 'x', expected a finite number"),
        ({"bias": [0.1, 0.2, float("nan")]}, "bias: got nan, expected a finite number"),
        ({"bias": [0.1, 0.2, 1e300]}, "bias: got 1e[+]300, expected at least"),
        ({"bias": 3}, "bias: got 3, expected three numbers"),
        ({"products": [[0, 0, 0]] * 2}, "products: got 2 rows, expected 3"),
        ({"products": {}}, r"products: got {}, expected 3"),
    ],
)
def test_a_map_that_does_not_fit_names_file_key_and_fix(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = vae_folder(tmp_path, {**PUBLISHED, "latent_channels": 2}, GOOD)
    assert PreviewMap.of_vae(folder) is not None
    vae_folder(tmp_path, {**PUBLISHED, "latent_channels": 2}, {**GOOD, **changes})
    with pytest.raises(CheckpointError, match=f"preview.json: {words}.*fit_preview"):
        PreviewMap.of_vae(folder)
