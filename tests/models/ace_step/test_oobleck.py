"""The chunked Oobleck autoencoder against diffusers' whole one, on random small weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderOobleck
from support.ace_step import random_vae
from torch import Tensor

from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.models.ace_step.oobleck import Geometry, Oobleck, check_config

CPU = torch.device("cpu")
STRIDES = [[2, 4, 6], [3, 2], [2, 3, 5], [5], [3, 3, 3]]


def pair(folder: Path, strides: list[int], **config: Any) -> tuple[AutoencoderOobleck, Oobleck]:
    reference = random_vae(strides, **config)
    reference.save_pretrained(folder)
    return reference, Oobleck.load(folder, CPU, torch.float32)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("strides", STRIDES)
@torch.no_grad()
def test_chunks_of_any_size_join_to_what_the_reference_decodes_whole(tmp_path: Path, strides: list[int]) -> None:
    reference, ours = pair(tmp_path, strides)
    for num_frames in (1, 2, 41):
        latents = drawn(num_frames, 8, seed=num_frames)
        expected = reference.decode(latents.T[None]).sample[0]
        assert expected.shape[1] == ours.geometry.num_samples(num_frames)
        for chunk in (3, 20, 41, None):
            pieces = list(ours.decode(latents, chunk))
            assert len(pieces) == (1 if chunk is None else -(-num_frames // chunk))
            assert_near(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("strides", STRIDES)
@torch.no_grad()
def test_tiles_of_any_size_join_to_what_the_reference_decodes_whole(tmp_path: Path, strides: list[int]) -> None:
    reference, ours = pair(tmp_path, strides)
    latents = drawn(41, 8)
    expected = reference.decode(latents.T[None]).sample[0]
    for tile in (9, 50, 333):
        ours.samples_of_tile = tile
        for chunk in (20, None):
            assert_near(torch.cat(list(ours.decode(latents, chunk)), dim=1), expected)


@torch.no_grad()
def test_on_the_cpu_channels_lie_inside_from_layer_to_layer(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, [2, 4])
    hidden, strides = ours.decoder.conv1(drawn(1, 8, 9)), []
    for layer in (*ours.decoder.block, ours.decoder.snake1, ours.decoder.conv2):
        hidden = layer(hidden)
        strides.append(hidden.stride(1))
    assert strides == [1, 1, 1, 1]


@pytest.mark.parametrize("strides", STRIDES)
@torch.no_grad()
def test_chunks_of_any_size_join_to_what_the_reference_encodes_whole(tmp_path: Path, strides: list[int]) -> None:
    reference, ours = pair(tmp_path, strides)
    hop = ours.geometry.hop
    for num_samples in (hop, 3 * hop - 1, 20 * hop + 1):
        audio = 0.3 * drawn(2, num_samples, seed=num_samples)
        expected = reference.encode(audio[None]).latent_dist.sample(torch.Generator().manual_seed(5))[0].T
        assert len(expected) == ours.geometry.num_frames(num_samples)
        for chunk in (1, 7, None):
            got = ours.encode(audio, torch.Generator().manual_seed(5), chunk)
            assert_near(got, expected)


@torch.no_grad()
def test_a_chunk_without_its_neighbours_would_be_heard(tmp_path: Path) -> None:
    """The tests above would prove nothing if a random network hardly looked beyond a frame."""
    reference, ours = pair(tmp_path, [2, 4, 4])
    latents, hop = drawn(60, 8), 32
    low, high = ours.geometry.frames_behind(30 * hop, 31 * hop)
    whole = reference.decode(latents.T[None]).sample[0, :, 30 * hop : 31 * hop]
    for start, stop in (((low + 30) // 2, high), (low, (31 + high) // 2)):
        window = reference.decode(latents[start:stop].T[None]).sample[0, :, (30 - start) * hop : (31 - start) * hop]
        assert (window - whole).abs().max() > 1e-4 * whole.abs().max()


def plain(strides: list[int]) -> AutoencoderOobleck:
    """A network without cancellation: all weights positive, no bias, the snakes as good as straight."""
    vae = random_vae(strides).double()
    for name, parameter in vae.named_parameters():
        torch.nn.init.constant_(parameter, 40.0 if name.endswith("beta") else float("weight" in name))
    return vae


@pytest.mark.parametrize("strides", STRIDES)
@torch.no_grad()
def test_dependencies_are_exact(strides: list[int]) -> None:
    """An impulse is heard in a range of the output if, and only if, it lies in the range that this one depends on."""
    vae, geometry, num_frames = plain(strides), Geometry(tuple(strides)), 200
    for start, stop in ((100 * geometry.hop, 101 * geometry.hop), (100 * geometry.hop + 1, 100 * geometry.hop + 2)):
        low, high = geometry.frames_behind(start, stop)
        assert 0 < low < 100 < high < num_frames
        for frame in (low - 1, low, high - 1, high):
            latents = torch.zeros(1, 8, num_frames, dtype=torch.float64)
            latents[:, :, frame] = 1
            is_heard = bool(vae.decode(latents).sample[0, :, start:stop].any())
            assert is_heard is (low <= frame < high), (frame, low, high)
    low, high = geometry.samples_behind(100, 101)
    assert 0 < low < high < num_frames * geometry.hop
    for sample in (low - 1, low, high - 1, high):
        audio = torch.zeros(1, 2, num_frames * geometry.hop, dtype=torch.float64)
        audio[:, :, sample] = 1
        is_heard = bool(vae.encode(audio).latent_dist.mean[0, :, 100].any())
        assert is_heard is (low <= sample < high), (sample, low, high)


def test_the_published_decoder_depends_on_nine_frames_to_each_side_at_most() -> None:
    geometry = Geometry((2, 4, 4, 6, 10))
    assert geometry.hop == 1920
    low, high = geometry.frames_behind(100 * 1920, 200 * 1920)
    assert 0 < 100 - low <= 9 and 0 < high - 200 <= 9
    assert geometry.num_samples(25) == 48_000 and geometry.num_frames(48_000) == 25


@torch.no_grad()
def test_the_activations_of_a_chunk_stay_below_the_limit(tmp_path: Path) -> None:
    reference = random_vae([2, 4, 6])
    widest = 16 * 48 * 4  # decoder_channels at full rate, hop samples, float32
    ours = Oobleck(reference, max_activation_bytes=10 * widest)
    assert ours.frames_of_chunk == 10
    assert [piece.shape[1] for piece in ours.decode(drawn(25, 8))] == [480, 480, 240]


@torch.no_grad()
def test_weight_norms_are_folded_away_and_change_nothing(tmp_path: Path) -> None:
    reference, ours = pair(tmp_path, [2, 4])
    names = [name for part in (ours.encoder, ours.decoder) for name, _ in part.named_parameters()]
    assert names and not any(name.endswith(("weight_g", "weight_v", "alpha", "beta")) for name in names)
    assert_near(ours.decoder(drawn(1, 8, 9)), reference.decoder(drawn(1, 8, 9)))


@torch.no_grad()
def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    reference, _ = pair(tmp_path, [2, 4])
    rough = Oobleck.load(tmp_path, CPU, torch.bfloat16)
    latents = drawn(20, 8)
    got, expected = torch.cat(list(rough.decode(latents, 6)), dim=1), reference.decode(latents.T[None]).sample[0]
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_what_is_too_short_or_of_other_channels_is_refused(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, [2, 4])
    with pytest.raises(InvalidRequestError, match=r"got 7 samples, expected at least 8"):
        ours.encode(torch.zeros(2, 7), torch.Generator())
    for wrong in (torch.zeros(1, 80), torch.zeros(80), torch.zeros(1, 2, 80)):
        with pytest.raises(InvalidRequestError, match=r"expected \[2, samples\]"):
            ours.encode(wrong, torch.Generator())


def test_missing_weights_are_named(tmp_path: Path) -> None:
    random_vae([2, 4]).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv1.bias"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing keys.*decoder\.conv1\.bias"):
        Oobleck.load(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"downsampling_ratios": [2, 1]}, r"downsampling_ratios\[1\]: got 1, expected at least 2"),
        ({"downsampling_ratios": [2]}, "two lists of equal length"),
        ({"channel_multiples": None}, "two lists of equal length"),
        ({"sampling_rate": 0}, "sampling_rate: got 0"),
        ({"audio_channels": "two"}, "audio_channels: got 'two'"),
    ],
)
def test_configs_that_make_no_sense_are_refused(change: dict[str, Any], words: str) -> None:
    config = dict(random_vae([2, 4]).config)
    check_config(config, "x")
    with pytest.raises(ConfigError, match=words):
        check_config({**config, **change}, "x")
