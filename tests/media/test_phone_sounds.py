"""Sounds as phones, browsers and films hold them, and as people hand over arrays: the same samples, or words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from support.media import picture, tone, video_bytes

from vllm_omni import Audio
from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_encoding import AudioStream, encode_audio
from vllm_omni.media.audio_input import check_audio, read_audio
from vllm_omni.media.video_files import VideoReader

LIMITS = LimitsConfig(max_audio_s=20.0, max_audio_mb=4.0)
RATE = 48_000
FIVE_ONE = ("FL", "FR", "FC", "LFE", "BL", "BR")


def read(source: Any, sample_rate: int = RATE, channels: int = 1) -> Any:
    check_audio(source, channels=channels, limits=LIMITS, name="audio")
    return read_audio(source, sample_rate=sample_rate, channels=channels, limits=LIMITS, name="audio")


def container_bytes(samples: Any, form: str, codec: str, layout: str, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        track = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return file.getvalue()


def pitch(samples: Any, rate: int = RATE) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


CONTAINERS = {
    "m4a": lambda samples: container_bytes(samples, "ipod", "aac", "mono"),
    "mp4": lambda samples: container_bytes(samples, "mp4", "aac", "mono"),
    "webm": lambda samples: container_bytes(samples, "webm", "libopus", "mono"),
    "mkv": lambda samples: container_bytes(samples, "matroska", "flac", "mono"),
    "aac": lambda samples: container_bytes(samples, "adts", "aac", "mono"),
    "aac with tags": lambda samples: encode_audio(Audio(samples, RATE), "aac"),
    "alac": lambda samples: container_bytes(samples, "ipod", "alac", "mono"),
    "film": lambda samples: video_bytes([picture()] * 8, 4, samples, RATE),
    "film in webm": lambda samples: video_bytes([picture()] * 8, 4, samples, RATE, "webm"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_sound_of_a_phone_is_read(kind: str, tmp_path: Path) -> None:
    samples = tone(2.0, RATE)
    content = CONTAINERS[kind](samples)
    path = tmp_path / f"sound.{kind[:4]}"
    path.write_bytes(content)
    for source in (content, path):
        seconds = check_audio(source, channels=1, limits=LIMITS, name="audio")
        found = read(source)[0]
        assert abs(seconds - 2.0) < 0.1 and abs(len(found) / RATE - 2.0) < 0.1
        assert abs(pitch(found) - 330) < 1 and abs(np.abs(found[RATE // 2 : RATE]).max() - 0.3) < 0.03


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "opus", "aac"])
def test_what_was_streamed_is_read_again(form: str) -> None:
    samples, stream = tone(2.0, RATE), AudioStream(form, RATE, 1)
    content = stream.write(samples) + stream.close()
    found = read(content)[0]
    assert abs(len(found) / RATE - 2.0) < 0.1 and abs(pitch(found) - 330) < 1


def test_a_sound_that_is_too_long_is_refused_by_its_packets() -> None:
    for kind in ("m4a", "webm", "aac"):
        with pytest.raises(InvalidRequestError, match=r"audio: got 2[12]\.\d\d s, expected at most 20 s"):
            check_audio(CONTAINERS[kind](tone(21.5, RATE)), channels=1, limits=LIMITS, name="audio")


def test_what_is_cut_or_holds_no_sound_is_refused_in_words() -> None:
    silent = video_bytes([picture()] * 4)
    for content, words in (
        (silent, "audio: got a file without sound"),
        (CONTAINERS["m4a"](tone(1.0, RATE))[:-300], "audio: got a file that is no sound"),
        (b"\x1aE\xdf\xa3" + bytes(100), "audio: got a file that is no sound"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "audio: got a file that is no sound"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            read(content)


# Channels


def wave(channels: int, speaking: int) -> Any:
    samples = np.zeros((channels, RATE), np.float32)
    samples[speaking] = tone(1.0, RATE)[0]
    return samples


@pytest.mark.parametrize(
    ("speaking", "left", "right"),
    [(0, 1, 0), (1, 0, 1), (2, 0.7071, 0.7071), (3, 0, 0), (4, 0.7071, 0), (5, 0, 0.7071)],
    ids=FIVE_ONE,
)
def test_five_one_is_mixed_down_with_the_standard_weights(speaking: int, left: float, right: float) -> None:
    samples, scale = wave(6, speaking), 1 / (1 + 2 * 0.7071)
    file = io.BytesIO()
    soundfile.write(file, samples.T, RATE, format="WAV", subtype="FLOAT")
    for source in ((samples, RATE), file.getvalue()):
        stereo = read(source, channels=2)
        assert np.allclose(stereo, [left * scale * samples[speaking], right * scale * samples[speaking]], atol=1e-4)
        assert np.allclose(read(source), stereo.mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("channels", range(2, 9))
def test_full_scale_in_every_channel_is_never_beyond_it(channels: int) -> None:
    loud = np.ones((channels, 100), np.float32)
    for wanted in (1, 2):
        assert 0.99 < read((loud, RATE), channels=wanted).max() <= 1.00001


def test_films_and_files_are_mixed_alike() -> None:
    samples = sum(wave(6, index) * (index + 1) / 6 for index in range(6))
    film = io.BytesIO()
    with av.open(film, "w", format="matroska") as container:
        pictures = container.add_stream("libx264", rate=4)
        pictures.height, pictures.width, pictures.pix_fmt = 24, 40, "yuv420p"
        track = container.add_stream("pcm_f32le", rate=RATE, layout="5.1")
        for index in range(4):
            frame = av.VideoFrame.from_ndarray(picture(seed=index), format="rgb24")
            frame.pts = index
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        packed = np.ascontiguousarray(samples.T.reshape(1, -1))
        block = av.AudioFrame.from_ndarray(packed, format="flt", layout="5.1")
        block.sample_rate, block.pts = RATE, 0
        container.mux(track.encode(block))
        container.mux(track.encode(None))
    with VideoReader(io.BytesIO(film.getvalue()), "video") as reader:
        of_film, rate = reader.sound(20.0)
    expected = read((samples, RATE))
    assert rate == RATE and np.allclose(of_film, expected, atol=1e-6)
    assert np.allclose(read(film.getvalue()), expected, atol=1e-6)


# Arrays


def test_samples_of_the_size_of_integers_are_refused_in_words() -> None:
    loud = (tone(0.1) * 32_767).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, loud.T, 16_000, format="WAV", subtype="FLOAT")
    for source in ((loud, 16_000), (loud.astype(np.float64), 16_000), (loud[0].tolist(), 16_000), file.getvalue()):
        with pytest.raises(
            InvalidRequestError, match=r"audio: got samples up to 9\d{3}.*, expected -1 to 1 at full scale"
        ):
            read(source, 16_000)
    assert read((loud.astype(np.int16), 16_000), 16_000).max() < 0.31
    assert read((tone(0.1) * 10, 16_000), 16_000).max() > 2.9, "a little beyond full scale is the caller's"


def test_lists_and_arrays_with_a_rate_are_taken() -> None:
    samples = tone(0.1, channels=2)
    for source in (
        (samples.tolist(), 16_000),
        [samples, 16_000],
        [samples.tolist(), 16_000],
        (tuple(map(tuple, samples.tolist())), 16_000),
        {"array": samples.tolist(), "sampling_rate": 16_000},
        {"array": torch.from_numpy(samples), "sample_rate": 16_000},
    ):
        assert np.allclose(read(source, 16_000, channels=2), samples)
    assert np.allclose(read((samples[0].tolist(), 16_000), 16_000), samples[:1])
