"""Sounds that a request brings: every kind of source becomes the same samples, and whatever is wrong with one is said
before anything is decoded, or at the block where it shows.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch

from vllm_omni import Audio
from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.media.audio_files import AudioReader
from vllm_omni.media.audio_input import check_audio, read_audio

LIMITS = LimitsConfig(max_audio_s=20.0, max_audio_mb=4.0)


def wave(rate: int = 16_000, seconds: float = 0.5, channels: int = 2) -> np.ndarray[Any, Any]:
    """float32 [channels, n], another tone in every channel."""
    times = np.arange(int(rate * seconds)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * 300 * (k + 1) * times) for k in range(channels)]).astype(np.float32)


def file_bytes(samples: Any, rate: int, container: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples).T, rate, format=container, subtype=subtype)
    return file.getvalue()


def read(source: Any, sample_rate: int = 16_000, channels: int = 2, limits: LimitsConfig = LIMITS) -> Any:
    return read_audio(source, sample_rate=sample_rate, channels=channels, limits=limits, name="audio")


def refusal(source: Any, channels: int = 2, limits: LimitsConfig = LIMITS) -> str:
    """The message of the check that decodes nothing; what refuses there refuses to read as well."""
    with pytest.raises(InvalidRequestError) as caught:
        check_audio(source, channels=channels, limits=limits, name="audio")
    with pytest.raises(InvalidRequestError, match=re.escape(str(caught.value))):
        read(source, channels=channels, limits=limits)
    assert str(caught.value).startswith("audio") and "0x" not in str(caught.value)
    return str(caught.value)


def late_refusal(source: Any) -> str:
    """The message of what shows only when samples are read."""
    assert check_audio(source, channels=2, limits=LIMITS, name="audio") > 0
    with pytest.raises(InvalidRequestError) as caught:
        read(source)
    assert str(caught.value).startswith("audio: ") and "0x" not in str(caught.value)
    return str(caught.value)


# Sources


def saved(folder: Path, samples: Any) -> Path:
    path = folder / "sound.wav"
    path.write_bytes(file_bytes(samples, 16_000))
    return path


SOURCES: dict[str, Callable[[Any, Path], Any]] = {
    "path": lambda samples, folder: saved(folder, samples),
    "string": lambda samples, folder: str(saved(folder, samples)),
    "bytes": lambda samples, folder: file_bytes(samples, 16_000),
    "memoryview": lambda samples, folder: memoryview(file_bytes(samples, 16_000)),
    "Audio": lambda samples, folder: Audio(samples, 16_000),
    "pair": lambda samples, folder: (samples, 16_000),
    "torch": lambda samples, folder: (torch.from_numpy(samples), 16_000),
    "strided": lambda samples, folder: (samples.T.copy().T, 16_000),
    "dict": lambda samples, folder: {"array": samples, "sampling_rate": np.int64(16_000), "path": None},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_samples(kind: str, tmp_path: Path) -> None:
    samples = wave(seconds=5.0)  # more than one block
    source = SOURCES[kind](samples, tmp_path)
    found = read(source)
    assert found.dtype == np.float32 and found.flags.c_contiguous and np.array_equal(found, samples)
    assert check_audio(source, channels=2, limits=LIMITS, name="audio") == 5.0


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [("FLAC", "PCM_16", 2**-15), ("OGG", "VORBIS", 0.05), ("AIFF", "PCM_24", 2**-22), ("MP3", None, 0.05)],
)
def test_any_container_is_read(container: str, subtype: str | None, tolerance: float) -> None:
    samples = wave(48_000, 0.5)
    found = read(file_bytes(samples, 48_000, container, subtype), sample_rate=48_000)
    assert found.shape == samples.shape and np.abs(found - samples)[:, 2000:-2000].max() <= tolerance


@pytest.mark.parametrize(
    ("dtype", "scale", "rest"),
    [("int16", 2**15, 0), ("int32", 2**31, 0), ("uint8", 2**7, 2**7), ("float16", 1, 0), ("float64", 1, 0)],
)
def test_arrays_of_other_types_are_brought_to_full_scale(dtype: str, scale: float, rest: float) -> None:
    values = np.array([[-0.5, 0.0, 0.25, 0.75]])
    given = (values * scale + rest).astype(dtype)
    for array in (given, torch.from_numpy(given)):
        assert np.array_equal(read((array, 16_000), channels=1), values.astype(np.float32))


def test_one_dimension_is_mono_and_bfloat16_is_widened() -> None:
    ramp = torch.tensor([0.0, 0.5, -0.5], dtype=torch.bfloat16)
    assert np.array_equal(read((ramp, 16_000), channels=1), np.array([[0.0, 0.5, -0.5]], np.float32))


# Channels and rates


def test_mono_is_repeated_and_stereo_is_averaged() -> None:
    left, right = wave()
    assert np.array_equal(read((left, 16_000), channels=2), np.stack([left, left]))
    assert np.allclose(read((np.stack([left, right]), 16_000), channels=1), [(left + right) / 2])
    assert np.array_equal(read((wave(channels=4), 16_000), channels=4), wave(channels=4))


@pytest.mark.parametrize(("given", "expected", "words"), [(9, 2, "1 to 8"), (9, 1, "1 to 8"), (2, 4, "1 or 4")])
def test_other_numbers_of_channels_are_refused(given: int, expected: int, words: str) -> None:
    message = refusal((wave(channels=given), 16_000), channels=expected)
    assert f"got {given} channels, expected {words}; arrays are [channels, n]" in message


@pytest.mark.parametrize(("source_rate", "target_rate"), [(44_100, 48_000), (48_000, 16_000), (8_000, 44_100)])
def test_resampling_block_by_block_is_resampling_at_once(source_rate: int, target_rate: int) -> None:
    samples = wave(source_rate, 10.0)
    found = read((samples, source_rate), sample_rate=target_rate, limits=LimitsConfig())
    whole = soxr.resample(samples.T, source_rate, target_rate, quality="HQ").T
    assert found.shape == whole.shape == (2, 10 * target_rate)
    assert np.abs(found - whole).max() < 1e-6
    assert np.abs(found - wave(target_rate, 10.0))[:, 2000:-2000].max() < 1e-3  # the same tone at the other rate


def test_a_sound_too_short_for_one_sample_at_the_new_rate_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="got 1 samples at 384000 Hz, expected at least one at 1000 Hz"):
        read((np.zeros(1, np.float32), 384_000), sample_rate=1000)


# What is refused, before anything is decoded


def wav(rate: int = 16_000, num_frames: int = 1600, declared: int | None = None, channels: int = 2) -> bytes:
    """A 16 bit WAV whose header claims `declared` bytes of samples."""
    data = bytes(2 * channels * num_frames)
    size = len(data) if declared is None else declared
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    head = b"RIFF" + struct.pack("<I", min(36 + size, 2**32 - 1)) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
    return head + b"data" + struct.pack("<I", size) + data


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (wav(declared=4 * 16_000), "got a truncated file, 0.90 s of 1.00 s are missing"),
        (wav(declared=4 * 16_000 * 36_000), "got 36000.00 s, expected at most 20 s (limits.max_audio_s)"),
        (wav(rate=0), "got a sample rate of 0 Hz"),
        (wav(rate=500), "sample rate: got 500, expected at least 1000 and at most 384000 (Hz)"),
        (wav(num_frames=0), "got a sound of no length"),
        (wav(channels=0), "got a file that is no sound"),
        (b"", "got a file that is no sound"),
        (b"not a sound at all" * 10, "got a file that is no sound"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "got a file that is no sound"),
        ((wave(seconds=21.0), 16_000), "got 21.00 s, expected at most 20 s"),
        ((wave(48_000, 15.0), 48_000), "got 5.5 MB, expected at most 4 (limits.max_audio_mb)"),
        (bytes(5 * 2**20), "got 5.0 MB, expected at most 4"),
        ((wave(), 0), "sampling rate: got 0, expected at least 1000"),
        ((wave(), 16_000.5), "sampling rate: got 16000.5, expected an integer"),
        ((wave(), None), "sampling rate: got None"),
        ((np.zeros((2, 0), np.float32), 16_000), "got a sound of no length"),
        ((np.zeros((1, 2, 8), np.float32), 16_000), "got the shape [1, 2, 8], expected [n] or [channels, n]"),
        ((np.float32(1.0), 16_000), "got an array of type float32"),
        ((wave().astype(complex), 16_000), "got an array of complex128, expected float16"),
        ((np.zeros(8, np.int64), 16_000), "got an array of int64"),
        ((torch.zeros(8, dtype=torch.bool), 16_000), "got an array of bool"),
        (([0, 1], 16_000), "got an array of int64"),
        ((["0.5"], 16_000), "got an array of str"),
        (([[0.0, 0.1], [0.0]], 16_000), "got a list that is no array"),
        (([0.0] * 600_000, 16_000), "got 4.6 MB, expected at most 4"),
        ([0.0, 0.1], "got list without its rate"),
        (torch.zeros(8), "got Tensor without its rate"),
        ((wave().T, 16_000), "got 8000 channels, expected 1 to 8; arrays are [channels, n]"),
        (wave(), "got ndarray without its rate, expected a path"),
        (7, "got int, expected a path, the bytes of a file"),
        ({"array": wave()}, "got dict with the keys ['array'], expected"),
        ({"array": wave(), "sampling_rate": 16_000, "rate": 1}, "audio['rate']: unknown key (known: array"),
    ],
    ids=lambda value: value.split(",")[0][:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_refused_before_it_is_decoded(source: Any, words: str) -> None:
    assert words in refusal(source)


def test_a_header_of_a_million_empty_parts_is_given_up_soon() -> None:
    class Counted(io.BytesIO):
        num_reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.num_reads += 1
            return super().read(size)

    file = Counted(b"RIFF\xff\xff\xff\x00WAVE" + b"junk\x00\x00\x00\x00" * 1_000_000)
    with pytest.raises(InvalidRequestError, match="no sound"):
        AudioReader(file, "audio")
    assert file.num_reads < 10_000


def test_the_length_is_refused_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    long = file_bytes(wave(seconds=21.0), 16_000, "FLAC", "PCM_16")
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    assert "got 21.00 s" in refusal(long)


def test_paths_that_are_no_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would be shortened
    assert "'sound.wav', which cannot be read (No such file or directory)" in refusal(Path("sound.wav"))
    assert "a folder or a device, expected a sound file" in refusal(tmp_path)
    assert "a folder or a device" in refusal("/dev/zero")
    assert "which is no name of a file" in refusal("a\0b")
    (tmp_path / "large.wav").write_bytes(bytes(5 * 2**20))
    assert "got 5.0 MB" in refusal(str(tmp_path / "large.wav"))


# What shows while it is decoded


def test_a_compressed_file_that_was_cut_is_refused() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 48_000)) * 0.1
    for container, subtype in (("FLAC", "PCM_16"), ("MP3", None)):
        whole = file_bytes(noise, 48_000, container, subtype)
        assert "truncated" in late_refusal(whole[: len(whole) // 2])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    samples = wave(seconds=6.0)
    samples[1, -1] = value
    assert "NaN or infinite" in late_refusal((samples, 16_000))
    assert "NaN or infinite" in late_refusal(file_bytes(samples, 16_000))


def test_a_number_beyond_float32_is_not_finite() -> None:
    assert "NaN or infinite" in late_refusal((np.full(8, 1e300), 16_000))


def test_a_wav_of_unknown_length_is_read_as_far_as_it_goes() -> None:
    assert read(wav(declared=0xFFFFFFFF)).shape == (2, 1600)  # as a pipe leaves it


@pytest.mark.parametrize("key", ["max_duration_s", "max_audio_s", "max_audio_mb"])
def test_limits_are_positive_numbers(key: str) -> None:
    from support.toy_engine import toy_config

    with pytest.raises(ConfigError, match=f"limits.{key}: got 0, expected more than 0"):
        toy_config(limits=LimitsConfig(**{key: 0})).validate()
