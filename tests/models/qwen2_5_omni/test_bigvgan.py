"""The vocoder: equal to transformers', pieces without seams, exact dependencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.speech import TOKEN2WAV
from torch import Tensor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniBigVGANConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavBigVGANModel

from vllm_omni.models.qwen2_5_omni.token2wav.bigvgan import BigVGAN, Geometry, normalised_decibels
from vllm_omni.models.qwen2_5_omni.token2wav.config import BigVGANConfig

TINY: dict[str, Any] = TOKEN2WAV["bigvgan_config"]
SHAPES = [TINY, {**TINY, "upsample_rates": [3, 4], "upsample_kernel_sizes": [3, 8], "resblock_kernel_sizes": [5, 3, 7]}]
MEL = TINY["mel_dim"]


def pair(shape: dict[str, Any], seed: int = 0) -> tuple[Qwen2_5OmniToken2WavBigVGANModel, BigVGAN]:
    torch.manual_seed(seed)
    reference = Qwen2_5OmniToken2WavBigVGANModel(Qwen2_5OmniBigVGANConfig(**shape)).eval().requires_grad_(False)
    for parameter in reference.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    reference.conv_post.weight.mul_(0.05)
    ours = BigVGAN(BigVGANConfig.from_dict(shape, "test")).requires_grad_(False)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def drawn(num_frames: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(num_frames, MEL, generator=torch.Generator().manual_seed(seed)) - 2


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_of_any_size_join_to_what_the_reference_makes_whole(shape: dict[str, Any]) -> None:
    reference, ours = pair(shape)
    for num_frames, sizes in ((1, (1, None)), (2, (1, None)), (60, (11, 25, None))):
        mel = drawn(num_frames, num_frames)
        expected = reference(mel.T[None]).reshape(1, -1)
        assert expected.shape[1] == num_frames * ours.config.hop and 0.01 < expected.abs().max() < 0.99
        for size in sizes:
            pieces = list(ours.decode(mel, slice(None), size))
            assert len(pieces) == (1 if size is None else -(-num_frames // size))
            assert_near(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_kept_frames_with_their_context_are_a_part_of_the_whole(shape: dict[str, Any]) -> None:
    _, ours = pair(shape)
    mel, hop = drawn(150), ours.config.hop
    whole = ours(mel)
    before, behind = ours.geometry.reach
    for start, stop in ((0, 10), (70, 80), (140, 150)):
        low, high = max(0, start - before), min(150, stop + behind)
        got = torch.cat(list(ours.decode(mel[low:high], slice(start - low, stop - low), 4)), dim=1)
        assert_near(got, whole[:, start * hop : stop * hop])


def test_quiet_and_loud_frames_are_limited_as_the_reference_limits_them() -> None:
    reference, _ = pair(TINY)
    mel = torch.linspace(-30, 20, 500)[:, None].repeat(1, MEL)
    assert_near(normalised_decibels(mel), reference.process_mel_spectrogram(mel))
    assert normalised_decibels(mel).min() == -1 and normalised_decibels(mel).max() == 1


def test_a_loud_sound_is_clipped() -> None:
    reference, ours = pair(TINY)
    for model in (reference, ours):
        model.conv_post.weight.mul_(1000)
    got, expected = ours(drawn(9)), reference(drawn(9).T[None]).reshape(1, -1)
    assert got.abs().max() == 1
    assert (got - expected).abs().max() < 1e-2


def plain(shape: dict[str, Any]) -> BigVGAN:
    """A network without cancellation: all weights positive, no bias, the snakes as good as straight."""
    ours = BigVGAN(BigVGANConfig.from_dict(shape, "test")).double().requires_grad_(False)
    for name, parameter in ours.named_parameters():
        is_weight = name.endswith("weight")
        torch.nn.init.constant_(parameter, 1.0 if is_weight else -60.0 if name.endswith("alpha") else 0.0)
    return ours


@pytest.mark.parametrize("shape", SHAPES)
def test_dependencies_are_exact(shape: dict[str, Any]) -> None:
    """An impulse is heard in a range of the output if, and only if, it lies in the range that this one depends on."""
    ours, num_frames = plain(shape), 200
    hop, geometry = ours.config.hop, ours.geometry
    for start, stop in ((100 * hop, 101 * hop), (100 * hop + 1, 100 * hop + 2)):
        low, high = geometry.frames_behind(start, stop)
        assert 0 < low < 100 < high < num_frames
        for frame in (low - 1, low, high - 1, high):
            mel = torch.zeros(1, MEL, num_frames, dtype=torch.float64)
            mel[:, :, frame] = 1
            is_heard = bool(ours.synthesise(mel)[0, 0, start:stop].any())
            assert is_heard is (low <= frame < high), (frame, low, high)


def test_a_piece_without_its_neighbours_would_be_heard() -> None:
    """The tests above would prove nothing if a random network hardly looked beyond a frame."""
    _, ours = pair(TINY)
    mel, hop = drawn(60), ours.config.hop
    whole = ours(mel)[:, 30 * hop : 31 * hop]
    for start, stop in ((28, 60), (0, 33)):
        part = ours(mel[start:stop])[:, (30 - start) * hop : (31 - start) * hop]
        assert (part - whole).abs().max() > 1e-4 * whole.abs().max()


def test_the_published_vocoder_depends_on_34_frames_to_each_side() -> None:
    published = BigVGANConfig.from_dict({}, "test")
    assert published.hop == 240 and published.channels[-1] == 24
    assert Geometry(published).reach == (34, 34)
    with torch.device("meta"):
        ours = BigVGAN(published)
    assert 1000 <= ours.frames_of_piece <= 4000, "ten seconds and more at once"


def test_the_activations_of_a_piece_stay_below_the_limit() -> None:
    config = BigVGANConfig.from_dict(TINY, "test")
    widest = max(2 * 4 * channels * rate for channels, rate in ((16, 5), (8, 15), (4, 30)))
    ours = BigVGAN(config, max_activation_bytes=10 * widest)
    assert ours.frames_of_piece == 10 and ours.num_pieces(25) == 3
    with torch.no_grad():
        pieces = list(ours.decode(drawn(25), slice(None)))
    assert [piece.shape[1] for piece in pieces] == [300, 300, 150]
