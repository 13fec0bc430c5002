"""Decoding in tiles: equal to diffusers' own, chosen for one picture, within the memory that is planned for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from support.dit import random_vae
from torch import Tensor

from vllm_omni import DiffusionParams, Omni, OmniOutput
from vllm_omni.config.loader import load_config
from vllm_omni.entrypoints.cli.graph_report import describe
from vllm_omni.errors import ConfigError, ResourceError
from vllm_omni.executor import memory
from vllm_omni.executor.memory import plan_memory, reserve_memory
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.models.z_image.spec import ZImageSpec
from vllm_omni.utils.files import assets_folder
from vllm_omni.worker.diffusion.previewer import to_pixels
from vllm_omni.worker.diffusion.tiling import DecodingSize, Tiling, decode_tiles, num_tiles

SCALE = 8
GB = 2**30
PROMPT = "a red circle left of a blue square"


def pixels_of(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode(latents[None]).sample[0] / 2 + 0.5


@pytest.mark.parametrize(("height", "width"), [(40, 40), (16, 52), (52, 16), (29, 31), (17, 64), (64, 28), (13, 28)])
@pytest.mark.parametrize("tile", [16, 20, 24])
def test_tiles_equal_those_of_diffusers(height: int, width: int, tile: int) -> None:
    vae = random_vae()
    latents = torch.randn(16, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pieces = list(decode_tiles(lambda part: pixels_of(vae, part), latents, tile, SCALE))
        whole = pixels_of(vae, latents)
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = tile, tile * SCALE, 0.25
        expected = to_pixels(pixels_of(vae, latents))
    assert len(pieces) == num_tiles(latents, tile)
    assert (torch.cat(pieces).int() - expected.int()).abs().max() <= 1
    assert (height <= tile and width <= tile) or not torch.equal(torch.cat(pieces), to_pixels(whole))


def test_a_tile_is_decoded_when_its_piece_is_asked_for() -> None:
    seen: list[list[int]] = []

    def decode(part: Tensor) -> Tensor:
        seen.append(list(part.shape[1:]))
        return part[:3].repeat_interleave(2, 1).repeat_interleave(2, 2)

    pieces = decode_tiles(decode, torch.zeros(4, 40, 20), 16, 2)
    assert len(next(pieces)) == 0 and seen == [[16, 16]]
    assert next(pieces).shape == (24, 40, 3) and seen == [[16, 16], [16, 8]]
    rest = list(pieces)
    assert [len(piece) for piece in rest] == [0, 24, 0, 24, 0, 8]
    assert torch.cat(rest).shape == (56, 40, 3)


def test_what_does_not_change_from_tile_to_tile_is_put_together_exactly() -> None:
    """A decoder that works on each pixel alone leaves no seam."""
    latents = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0))
    whole = latents.repeat_interleave(2, 1).repeat_interleave(2, 2)
    pieces = decode_tiles(lambda part: part.repeat_interleave(2, 1).repeat_interleave(2, 2), latents, 16, 2)
    assert torch.equal(torch.cat(list(pieces)), to_pixels(whole))


SIZE = DecodingSize(scale=8, tile=64, pixel_bytes=100)


@pytest.mark.parametrize(
    ("height", "width", "budget", "tile"),
    [
        (128, 128, None, None),
        (128, 128, SIZE.num_bytes(128, 128), None),
        (128, 128, SIZE.num_bytes(128, 128) - 1, 64),
        (128, 128, SIZE.num_bytes(64, 64) - 1, 32),
        (128, 128, 1, 16),
        (20, 20, 1, 16),
        (16, 16, 1, None),
        (16, 4096, SIZE.num_bytes(32, 32), 32),
    ],
)
def test_the_largest_tile_within_the_budget_is_taken(
    height: int, width: int, budget: int | None, tile: int | None
) -> None:
    assert Tiling(SIZE, budget).tile_of(height, width) == tile


def test_always_is_the_published_size_whatever_fits() -> None:
    assert Tiling(SIZE, is_always=True).tile_of(65, 10) == 64
    assert Tiling(SIZE, is_always=True).tile_of(64, 64) is None


@pytest.mark.parametrize(
    ("config", "tile", "pixel_bytes"),
    [
        # measured with diffusers 0.42 on a CPU: 3174, 1646, 2660, 804 bytes (the rise of resident memory over a decode)
        ({"block_out_channels": [128, 256, 512, 512], "sample_size": 1024}, 128, 3174),
        ({"block_out_channels": [64, 128, 256, 256], "sample_size": 512}, 64, 1646),
        ({"block_out_channels": [128, 128, 256, 256]}, 128, 2660),
        ({"block_out_channels": [32, 64, 64, 64], "sample_size": 32}, 16, 804),
    ],
)
def test_what_is_planned_covers_what_was_measured(
    tmp_path: Path, config: dict[str, Any], tile: int, pixel_bytes: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = DecodingSize.of_folder(tmp_path, SCALE, torch.float32)
    assert size.tile == tile and pixel_bytes <= size.pixel_bytes <= 1.1 * pixel_bytes


@pytest.mark.parametrize(("force_upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_a_stage_in_float16_is_planned_with_what_its_decoder_computes_in(
    tmp_path: Path, force_upcast: bool, dtype: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"block_out_channels": [32, 64], "force_upcast": force_upcast}))
    held = {each: DecodingSize.of_folder(tmp_path, SCALE, each).pixel_bytes for each in (torch.float16, torch.float32)}
    assert held[torch.float32] / held[torch.float16] == pytest.approx(4 / dtype.itemsize, rel=0.01)


@pytest.mark.parametrize("widths", [[], "x", [0], [1.5], [2**30], None])
def test_widths_that_are_none_are_refused(tmp_path: Path, widths: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"block_out_channels": widths}))
    with pytest.raises(ConfigError, match="block_out_channels"):
        DecodingSize.of_folder(tmp_path, SCALE, torch.float32)


@pytest.fixture
def much_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 1000 * GB)


def config(max_memory_gb: float = 16.0, **keys: Any) -> list[str]:
    given = {"resources.max_memory_gb": max_memory_gb, **{f"image.{key}": value for key, value in keys.items()}}
    return ["dtype=float32", *(f"{key}={value}" for key, value in given.items())]


def planned(overrides: list[str]) -> tuple[Any, str]:
    pipeline = Pipeline(load_config("tiny_image", overrides))
    plans = plan_memory(pipeline)
    reserve_memory(pipeline.config, plans)
    return plans["image"], describe(pipeline, plans)


@pytest.mark.usefixtures("much_free_memory")
def test_the_plan_counts_what_decoding_takes() -> None:
    size = ZImageSpec(assets_folder() / "tiny-image").decoding_size(torch.float32)
    enough, report = planned(config(16))
    assert enough.decoding_bytes == 4_194_304 * size.pixel_bytes and "in tiles" not in report
    assert " decoding " in report
    short, report = planned(config(0.7))
    assert size.num_bytes(16, 16) < short.decoding_bytes < enough.decoding_bytes
    assert "pixels are decoded in tiles of 128x128: memory does not suffice" in report
    with pytest.raises(ResourceError):
        planned(config(0.7, vae_tiling="never"))
    always, report = planned(config(0.7, vae_tiling="always"))
    assert always.decoding_bytes == size.num_bytes(16, 16) and "vae_tiling: always" in report


def pixels(output: OmniOutput) -> np.ndarray:
    assert output.error is None, output.error
    return np.stack([np.asarray(image) for image in output.images]).astype(int)


@pytest.mark.usefixtures("much_free_memory")
def test_a_picture_in_tiles_is_that_of_diffusers_and_does_not_depend_on_its_batch_mates() -> None:
    params = DiffusionParams(seed=7, height=192, width=256, num_outputs=2)
    small = DiffusionParams(seed=1, num_inference_steps=12)
    with Omni("tiny_image", overrides=config(16), progress=False) as omni:
        (whole,) = omni.generate(PROMPT, params)
        (small_whole,) = omni.generate(PROMPT, small)
    outputs = "outputs=[image, image.latents]"
    with Omni("tiny_image", overrides=[*config(vae_tiling="always"), outputs], progress=False) as omni:
        (tiled,) = omni.generate(PROMPT, params)
        crowd = omni.generate([PROMPT, "a large pink star", PROMPT], [small, DiffusionParams(seed=3), params])
    assert not np.array_equal(pixels(tiled), pixels(whole))
    vae = AutoencoderKL.from_pretrained(str(assets_folder() / "tiny-image" / "vae"))
    vae.enable_tiling()
    with torch.inference_mode():
        latents = tiled.tensors["image.latents"] / vae.config.scaling_factor + vae.config.shift_factor
        expected = [to_pixels(pixels_of(vae, each)).numpy().astype(int) for each in latents]
    assert np.abs(pixels(tiled) - np.stack(expected)).max() <= 1
    assert np.abs(pixels(crowd[2]) - pixels(tiled)).max() <= 1
    assert np.abs(pixels(crowd[0]) - pixels(small_whole)).max() <= 1  # it fits into one tile


@pytest.mark.usefixtures("much_free_memory")
def test_others_go_on_between_two_tiles() -> None:
    with Omni("tiny_image", overrides=config(vae_tiling="always"), progress=False) as omni:
        large = omni.stream(PROMPT, DiffusionParams(seed=0, num_inference_steps=1, height=256, width=256))
        after = [part for part in large if not part.finished and part.progress["image"].step == 1]
    assert len(after) == 9  # the denoising step, and each of nine tiles but the last


@pytest.mark.usefixtures("much_free_memory")
def test_a_saved_picture_is_decoded_in_the_tiles_that_it_would_have_been(tmp_path: Path) -> None:
    params = DiffusionParams(seed=7, height=192, width=256, num_inference_steps=4)
    path = tmp_path / "x.safetensors"
    with Omni("tiny_image", overrides=config(0.27), progress=False) as omni:
        (tiled,) = omni.generate(PROMPT, params)
        for part in omni.stream(PROMPT, params):
            if not part.finished and part.progress["image"].step >= 4:  # while tiles are being decoded, too
                omni.save_state(part.request_id, path)
    for overrides in (config(0.27), config(16)):
        with Omni("tiny_image", overrides=overrides, progress=False) as omni:
            assert np.array_equal(pixels(omni.resume(path)), pixels(tiled))
            if overrides == config(16):
                assert not np.array_equal(pixels(omni.generate(PROMPT, params)[0]), pixels(tiled))
                for part in omni.stream(PROMPT, params):
                    if not part.finished and part.progress["image"].step == 2:
                        omni.save_state(part.request_id, path)
    with Omni("tiny_image", overrides=config(0.27), progress=False) as omni:
        error = omni.resume(path).error
    assert "tile: got None, but such pictures are decoded in tiles of at most 16 latents here" in str(error)


def test_a_model_that_decodes_nothing_in_tiles_says_so() -> None:
    with pytest.raises(ConfigError, match=r"stages\.sound.*vae_tiling: got 'always', but this model decodes nothing"):
        Pipeline(load_config("tiny_audio", ["sound.vae_tiling=always"]))
