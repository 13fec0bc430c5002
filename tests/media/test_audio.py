"""Audio, the sound that the caller holds: what it refuses, files in three formats, a picture, a player; and how the
payload of a stage becomes one.
"""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from vllm_omni import Audio
from vllm_omni.engine.output import make_result
from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.payload import StagePayload


def tone(rate: int = 16_000, seconds: float = 0.5, channels: int = 2, hertz: float = 440.0) -> Audio:
    times = np.arange(int(rate * seconds)) / rate
    wave = 0.5 * np.sin(2 * np.pi * hertz * times)
    return Audio(np.stack([wave * (channel + 1) / channels for channel in range(channels)]).astype(np.float32), rate)


def test_a_sound_knows_its_channels_and_length_and_cannot_be_written_into() -> None:
    given = np.zeros((2, 8000), np.float32)
    audio = Audio(given, 16_000)
    assert (audio.num_channels, audio.duration_s, audio.sample_rate) == (2, 0.5, 16_000)
    assert repr(audio) == "Audio(0.50 s, stereo, 16000 Hz)"
    with pytest.raises(ValueError, match="read-only"):
        audio.samples[0, 0] = 1
    given[0, 0] = 1  # the caller's own array is left as it was


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.zeros((1, 4)), 16_000, r"got float64 \[1, 4\], expected a numpy array float32 \[channels, n\]"),
        (np.zeros(4, np.float32), 16_000, r"got float32 \[4\]"),
        (np.zeros((0, 4), np.float32), 16_000, r"got float32 \[0, 4\]"),
        ([[0.0]], 16_000, "samples: got list"),
        (np.full((1, 4), np.nan, np.float32), 16_000, "NaN or infinite"),
        (np.full((1, 4), np.inf, np.float32), 16_000, "NaN or infinite"),
        (np.zeros((1, 4), np.float32), 0, r"sample_rate: got 0, expected at least 1000 and at most 384000 \(Hz\)"),
        (np.zeros((1, 4), np.float32), 16e3, "sample_rate: got 16000.0, expected an integer"),
    ],
)
def test_what_is_no_sound_is_refused(samples: Any, rate: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        Audio(samples, rate)


# Files


@pytest.mark.parametrize(("suffix", "tolerance"), [(".wav", 2**-15), (".flac", 2**-22), (".ogg", 0.05)])
def test_a_saved_sound_reads_back_the_same(tmp_path: Path, suffix: str, tolerance: float) -> None:
    audio = tone(rate=44_100, seconds=2.5)  # more than one block of frames
    path = tmp_path / f"sound{suffix}"
    audio.save(path)
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == 44_100 and samples.shape == (110_250, 2)
    assert np.abs(samples.T - audio.samples).max() <= tolerance


def test_samples_beyond_full_scale_are_cut_not_wrapped(tmp_path: Path) -> None:
    Audio(np.array([[2.0, -2.0, 0.5]], np.float32), 8000).save(tmp_path / "loud.WAV")
    samples, _ = soundfile.read(tmp_path / "loud.WAV")
    assert np.allclose(samples, [1.0, -1.0, 0.5], atol=1e-4)


def test_a_sound_goes_into_known_formats_only(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"got '.*x\.wma', expected .* ends in \.wav or \.flac or \.ogg"):
        tone().save(tmp_path / "x.wma")
    with pytest.raises(InvalidRequestError, match=r"got '.*x\.jpg', expected a name that ends in \.png"):
        tone().plot(tmp_path / "x.jpg")
    with pytest.raises(InvalidRequestError, match=r"ogg: got 384000 Hz, expected at most 200000 Hz"):
        tone(rate=384_000).save(tmp_path / "x.ogg")
    with pytest.raises(InvalidRequestError, match=r"flac: 9 channels at 16000 Hz cannot be written as FLAC"):
        tone(channels=9).save(tmp_path / "x.flac")
    with pytest.raises(FileNotFoundError):
        tone().save(tmp_path / "nowhere" / "x.wav")


def test_a_notebook_gets_a_player_with_the_sound_in_it() -> None:
    found = re.search(r'<audio controls src="data:audio/wav;base64,([^"]+)"', tone()._repr_html_())
    assert found
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(found[1])), dtype="float32")
    assert rate == 16_000 and np.abs(samples.T - tone().samples).max() <= 2**-15
    assert "base64" not in tone(rate=1000, seconds=121)._repr_html_()


# The picture


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def brightest_rows(path: Path) -> np.ndarray[Any, Any]:
    """Rows of the lower panel's middle columns where the spectrogram is brightest."""
    lower = pixels(path)[190:500, 300:500].sum(axis=2)
    return lower.argmax(axis=0) + 190


def test_a_plot_shows_a_higher_tone_higher_up(tmp_path: Path) -> None:
    tone(hertz=300.0).plot(tmp_path / "low.png")
    tone(hertz=3000.0).plot(tmp_path / "high.png")
    low, high = brightest_rows(tmp_path / "low.png"), brightest_rows(tmp_path / "high.png")
    assert low.std() < 3 and high.std() < 3 and low.mean() > high.mean() + 50


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("rate", "seconds"), [(1000, 0.5), (8000, 1 / 8000), (384_000, 0.01), (48_000, 1.0)])
def test_any_rate_and_length_can_be_drawn(tmp_path: Path, rate: int, seconds: float) -> None:
    tone(rate, seconds).plot(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").std() > 0


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    script = (
        "import sys, numpy; from vllm_omni import Audio\n"
        f"Audio(numpy.zeros((1, 4000), numpy.float32), 8000).plot({str(tmp_path / 'x.png')!r})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == 0
    assert (tmp_path / "x.png").is_file()


# From a stage


def payload(sounds: torch.Tensor, **meta: Any) -> StagePayload:
    return StagePayload("r", "music", {"audio": sounds}, meta)


def test_a_payload_becomes_one_sound_per_output() -> None:
    sounds = torch.randn(3, 2, 100)
    audios = make_result(payload(sounds, sample_rate=48_000)).audios
    assert [(audio.sample_rate, audio.samples.shape) for audio in audios] == [(48_000, (2, 100))] * 3
    assert all(np.array_equal(audio.samples, sound.numpy()) for audio, sound in zip(audios, sounds, strict=True))
    before = audios[0].samples.copy()
    sounds.zero_()
    assert np.array_equal(audios[0].samples, before)  # the caller owns it


def test_audio_of_no_length_can_be_shown_and_saved_as_any_other(tmp_path: Path) -> None:
    (audio,) = make_result(payload(torch.zeros(1, 1, 0), sample_rate=24_000)).audios
    assert audio.samples.shape == (1, 0) and audio.sample_rate == 24_000 and audio.duration_s == 0
    assert repr(audio) == "Audio(0.00 s, mono, 24000 Hz)" and "<audio" in audio._repr_html_()
    for suffix in (".wav", ".flac", ".ogg"):
        path = tmp_path / f"a{suffix}"
        audio.save(path)
        with soundfile.SoundFile(path) as file:
            assert file.frames == (suffix != ".wav") and (file.samplerate, file.channels) == (24_000, 1)
    audio.plot(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_half_precision_is_widened_and_no_audio_is_none() -> None:
    (audio,) = make_result(payload(torch.ones(1, 1, 4, dtype=torch.bfloat16), sample_rate=8000)).audios
    assert audio.samples.dtype == np.float32
    assert make_result(StagePayload("r", "text", meta={"text": "hi"})).audios == ()


@pytest.mark.parametrize(
    ("sounds", "meta", "words"),
    [
        (torch.zeros(1, 2, 8), {}, "sample_rate: got None"),
        (torch.zeros(2, 8), {"sample_rate": 8000}, r"audio is torch.float32 \[2, 8\], expected floating point \[N, ch"),
        (torch.zeros(1, 2, 8, dtype=torch.int16), {"sample_rate": 8000}, "audio is torch.int16"),
        (torch.full((1, 2, 8), torch.nan), {"sample_rate": 8000}, "NaN or infinite"),
        (torch.zeros(1, 0, 8), {"sample_rate": 8000}, r"float32 \[0, 8\]"),
    ],
)
def test_a_stage_that_gives_no_sound_is_to_blame(sounds: torch.Tensor, meta: dict[str, Any], words: str) -> None:
    with pytest.raises(StageError, match=f"stage 'music': .*{words}"):
        make_result(payload(sounds, **meta))
