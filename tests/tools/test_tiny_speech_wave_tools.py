"""The tools around the tiny speaking model's sound: spectrograms, codes, the vocoder and the flow matching model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavDiTModel

from tools.tiny.speech import train_dit, train_vocoder
from tools.tiny.speech.codes import Codebook, features, k_means, paired
from tools.tiny.speech.mel import CEILING, FLOOR, HOP, SAMPLE_RATE, filters, log_mel
from tools.tiny.speech.quick_activation import with_quick_activations
from tools.tiny.speech.recordings import Pieces, recordings
from tools.tiny.speech.synthesise import has_synthesiser

needs_voice = pytest.mark.skipif(not has_synthesiser(), reason="espeak-ng is not installed")


def tone(frequency: float, amplitude: float = 0.3, num_samples: int = 4800) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(num_samples) / SAMPLE_RATE)


def gliding_mels(count: int, seed: int = 0) -> list[Tensor]:
    """Spectrograms of tones that glide: many different frames."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for low, high in (200 + 3000 * torch.rand(count, 2, generator=generator)).tolist():
        frequency = torch.linspace(low, high, 9600)
        found.append(log_mel(0.3 * torch.sin(2 * math.pi * frequency.cumsum(0) / SAMPLE_RATE)))
    return found


def test_a_spectrogram_has_a_frame_for_every_240_samples_begun() -> None:
    assert [len(log_mel(torch.zeros(n))) for n in (240, 241, 480, 24_000)] == [1, 2, 2, 100]


def test_silence_lies_on_the_floor_and_twice_the_sound_is_the_logarithm_of_two_more() -> None:
    assert bool((log_mel(torch.zeros(960)) == FLOOR).all())
    soft, loud = log_mel(tone(1000, 0.1))[5:-5], log_mel(tone(1000, 0.2))[5:-5]
    audible = soft > FLOOR
    assert (loud - soft)[audible].mean().item() == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("frequency", [150.0, 700.0, 3000.0, 9000.0])
def test_a_tone_is_loudest_in_the_band_that_holds_it(frequency: float) -> None:
    band = int(log_mel(tone(frequency))[10].argmax())
    heard = filters()[band] > 0
    bins = torch.linspace(0, SAMPLE_RATE / 2, len(heard))[heard]
    assert bins.min() - 24 <= frequency <= bins.max() + 24


def test_a_frame_is_centred_on_its_own_samples() -> None:
    click = torch.zeros(40 * HOP)
    click[20 * HOP + HOP // 2] = 1.0
    assert int(log_mel(click).sum(dim=1).argmax()) == 20


def test_codes_that_are_spelled_out_are_found_again() -> None:
    codebook = Codebook.fit(gliding_mels(12), num_codes=32)
    codes = torch.randint(32, (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(codebook.encode(codebook.decode(codes)), codes)


def test_silence_is_code_zero_and_nothing_else_is() -> None:
    mels = gliding_mels(12)
    codebook = Codebook.fit(mels, num_codes=32)
    assert codebook.encode(torch.full((7, 80), FLOOR)).tolist() == [0] * 4
    assert all(bool((codebook.encode(mel) > 0).all()) for mel in mels)


def test_more_codes_describe_a_spectrogram_more_closely() -> None:
    mels = gliding_mels(20)
    errors = []
    for num_codes in (8, 32, 128):
        codebook = Codebook.fit(mels, num_codes)
        errors.append(float(torch.stack([(codebook.decode(codebook.encode(m)) - m).abs().mean() for m in mels]).mean()))
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2]


def test_codes_survive_saving_and_fit_the_same_from_the_same_seed(tmp_path: Path) -> None:
    mels = gliding_mels(12)
    codebook, again = Codebook.fit(mels, 32, seed=3), Codebook.fit(mels, 32, seed=3)
    codebook.save(tmp_path / "codebook.safetensors")
    loaded = Codebook.load(tmp_path / "codebook.safetensors")
    assert torch.equal(codebook.centres, again.centres)
    assert all(torch.equal(codebook.encode(mel), loaded.encode(mel)) for mel in mels)


def test_too_little_sound_for_the_codes_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 20 pairs of frames with sound, expected at least 64"):
        Codebook.fit([*gliding_mels(1), torch.full((100, 80), FLOOR)], num_codes=64)


def test_centres_without_points_find_some() -> None:
    points = torch.cat([torch.zeros(50, 2), torch.ones(50, 2), 2 * torch.ones(50, 2)])
    centres = k_means(points, 3, torch.Generator().manual_seed(1))
    assert sorted(set(centres[:, 0].tolist())) == [0.0, 1.0, 2.0]


def test_rough_shape_counts_more_than_pitch() -> None:
    flat = torch.full((2, 80), -2.0)
    ripple = 0.3 * torch.cos(math.pi * (torch.arange(80) + 0.5) * 40 / 80)
    tilt = 0.3 * torch.cos(math.pi * (torch.arange(80) + 0.5) * 2 / 80)
    pairs = torch.cat([paired(flat), paired(flat + ripple), paired(flat + tilt)])
    distances = torch.cdist(features(pairs)[:1], features(pairs)[1:])[0]
    assert distances[0] < 0.25 * distances[1]


def test_quick_activations_have_the_values_and_gradients_of_the_published_ones() -> None:
    torch.manual_seed(0)
    published = train_vocoder.fresh_model()
    for name, parameter in published.named_parameters():
        if name.endswith(("alpha", "beta")):
            nn.init.normal_(parameter, std=0.3)
    quick = with_quick_activations(copy.deepcopy(published))
    assert list(quick.state_dict()) == list(published.state_dict())
    mel = torch.randn(2, 12, 80)
    with torch.compiler.set_stance("force_eager"):
        samples = [train_vocoder.decode(model, mel) for model in (published, quick)]
        for found in samples:
            found.square().sum().backward()
    torch.testing.assert_close(samples[1], samples[0], atol=2e-6, rtol=1e-4)
    for ours, theirs in zip(quick.parameters(), published.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5 * float(theirs.grad.abs().max()), rtol=1e-3)


def test_distance_of_spectra_hears_pitch_loudness_and_jumps_of_phase_but_no_delay() -> None:
    wanted = tone(400, num_samples=9600)[None]
    delayed = tone(400, num_samples=9630)[None, 30:]
    louder = tone(400, amplitude=0.6, num_samples=9600)[None]
    higher = tone(450, num_samples=9600)[None]
    jumping = torch.cat([wanted[:, start : start + HOP] * (-1) ** (start // HOP) for start in range(0, 9600, HOP)], 1)
    found = [float(train_vocoder.spectra_distance(one, wanted)) for one in (wanted, delayed, louder, higher, jumping)]
    assert found[0] < 1e-3
    assert 20 * found[1] < found[2] < found[3] < found[4]


class Oracle(Qwen2_5OmniToken2WavDiTModel):
    """Knows the spectrogram, and notes the conditions that it is given."""

    def __init__(self, mel: Tensor) -> None:
        super().__init__(Qwen2_5OmniDiTConfig(**{**train_dit.CONFIG, "num_hidden_layers": 1}))
        self.mel, self.seen = mel, {}

    def forward(self, hidden_states: Tensor, time_step: Tensor, apply_cfg: bool = True, **given: Any) -> Tensor:
        self.seen = given
        rest = (1 - time_step).clamp(min=1e-6).reshape(-1, 1, 1)
        velocity = (self.mel - hidden_states) / rest
        return torch.cat([velocity, velocity]) if apply_cfg else velocity


def test_the_velocity_that_is_learnt_is_the_one_that_the_published_sampler_integrates() -> None:
    mel = torch.randn(4, 144, 80)
    codes, generator = torch.zeros(4, 72, dtype=torch.int64), torch.Generator().manual_seed(0)
    voice = {"cond": torch.ones(1, 16), "ref_mel": torch.zeros(1, 30, 80)}
    assert float(train_dit.loss(Oracle(mel), mel, codes, voice, generator)) < 1e-6
    made = Oracle(mel[:1]).sample(voice["cond"], voice["ref_mel"], codes[:1], num_steps=40)
    assert (made[0].T - mel[0]).abs().max() < 0.2


def test_rows_without_condition_have_no_codes_and_no_voice() -> None:
    mel, codes = torch.randn(400, 4, 80), torch.ones(400, 2, dtype=torch.int64)
    voice = {"cond": torch.ones(1, 16), "ref_mel": torch.ones(1, 30, 80)}
    oracle = Oracle(mel)
    train_dit.loss(oracle, mel, codes, voice, torch.Generator().manual_seed(0))
    parts = ("quantized_code", "speaker_embedding", "condition_vector")
    dropped = torch.stack([(oracle.seen[name].flatten(1) == 0).all(dim=1) for name in parts])
    kept = torch.stack([(oracle.seen[name].flatten(1) == 1).all(dim=1) for name in parts])
    assert bool((dropped == dropped[0]).all()) and bool((kept == ~dropped).all())
    assert 0.08 < dropped[0].float().mean() < 0.22


@needs_voice
def test_recordings_are_whole_codes_and_hardly_ever_too_loud_for_the_vocoder() -> None:
    data = recordings(12, seed=0)
    assert all(len(one.mel) * HOP == len(one.samples) and len(one.mel) % 2 == 0 for one in data)
    mel = torch.cat([one.mel for one in data])
    assert mel.max() <= CEILING and (mel == CEILING).float().mean() < 1e-3


@needs_voice
def test_pieces_are_samples_with_their_spectrogram() -> None:
    mel, samples = Pieces(recordings(6, seed=0), num_frames=20, seed=0).next(3)
    for row in range(3):
        torch.testing.assert_close(log_mel(samples[row])[2:-2], mel[row, 2:-2], atol=1e-3, rtol=1e-3)


@needs_voice
def test_batches_begin_with_a_whole_code() -> None:
    data = recordings(20, seed=0)
    codebook = Codebook.fit([one.mel for one in data], num_codes=64)
    mel, codes = train_dit.Batches(data, codebook, size=8, seed=0).next()
    assert mel.shape == (8, train_dit.PIECE, 80)
    assert all(torch.equal(codebook.encode(mel[row]), codes[row]) for row in range(8))
