"""Videos as callers hold them and as files: the frames, the rate, the sound, the colours, what they say of themselves,
and how much memory it takes to write them.
"""

from __future__ import annotations

import io
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from support.media import picture, tone

from vllm_omni import Audio, Video
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.file_info import read_file_info
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.media.video_encoding import VIDEO_FORMATS, encode_video
from vllm_omni.media.video_files import VideoReader
from vllm_omni.output import OmniOutput, RequestStatus, StageResult

FILMS = ("mp4", "webm")
RATE = 16_000
MADE = MediaMetadata(
    prompt='ein roter Bär, "groß"\nund 熊', seed=7, model="m/wan", version="vllm-omni 0", parameters={"fps": 12}
)


def film(num_frames: int = 12, height: int = 32, width: int = 48, fps: float = 12.0, **rest: Any) -> Video:
    return Video(np.stack([picture(height, width, seed) for seed in range(num_frames)]), fps, **rest)


def decoded(content: bytes) -> tuple[np.ndarray, float]:
    """(frames, rate) as our reader of films finds them."""
    with VideoReader(io.BytesIO(content), "film") as reader:
        return np.stack(list(reader.frames(range(reader.header.num_frames)))), reader.header.fps


# The type


def test_a_video_knows_its_measures_and_hands_out_frames() -> None:
    video = film()
    assert (video.num_frames, video.height, video.width, video.duration_s) == (12, 32, 48, 1.0)
    assert repr(video) == "Video(1.00 s, 12 frames of 48x32, 12 fps)"
    assert np.array_equal(np.asarray(video.frame(3)), video.frames[3])
    assert np.array_equal(np.asarray(video.frame(-1)), video.frames[11])
    with pytest.raises(IndexError):
        video.frame(12)


def test_frames_are_shared_and_read_only() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    video = Video(frames, 8)
    with pytest.raises(ValueError, match="read-only"):
        video.frames[0] = 1
    frames[0] = 9
    assert video.frames[0, 0, 0, 0] == 9


@pytest.mark.parametrize(
    ("frames", "fps", "words"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), 8, r"frames: got float32 \[2, 4, 4, 3\], expected a numpy array uint8"),
        (np.zeros((4, 4, 3), np.uint8), 8, r"frames: got uint8 \[4, 4, 3\]"),
        (np.zeros((2, 4, 4, 1), np.uint8), 8, "frames: got uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), 8, "frames: got uint8"),
        ([1], 8, "frames: got list"),
        (np.zeros((2, 4, 4, 3), np.uint8), 0, "fps: got 0"),
        (np.zeros((2, 4, 4, 3), np.uint8), 1000, "fps: got 1000"),
        (np.zeros((2, 4, 4, 3), np.uint8), float("nan"), "fps"),
    ],
)
def test_what_is_no_video_is_refused(frames: Any, fps: float, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        Video(frames, fps)


# Files


@pytest.mark.parametrize("form", FILMS)
@pytest.mark.parametrize("fps", [8.0, 24_000 / 1001, 60.0])
def test_a_film_holds_every_frame_at_its_rate(form: str, fps: float) -> None:
    video = film(height=64, width=96, fps=fps)
    frames, rate = decoded(encode_video(video, form))
    assert frames.shape == video.frames.shape and rate == pytest.approx(fps, rel=0.01)
    assert np.abs(frames.astype(int).mean((1, 2)) - video.frames.mean((1, 2))).max() < 3
    assert [int(np.abs(frames[i].astype(int) - video.frames).mean((1, 2, 3)).argmin()) for i in range(12)] == [
        *range(12)
    ]


@pytest.mark.parametrize("form", FILMS)
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (255, 255, 255), (0, 0, 0)])
def test_colours_stay_what_they_are_and_the_file_says_how_they_are_meant(
    form: str, colour: tuple[int, int, int]
) -> None:
    content = encode_video(Video(np.full((3, 32, 32, 3), colour, np.uint8), 8), form)
    assert np.abs(decoded(content)[0].astype(int) - colour).max() <= 3
    with av.open(io.BytesIO(content)) as container:
        said = container.streams.video[0].codec_context
        assert (said.colorspace, said.color_primaries, said.color_trc, said.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize("form", FILMS)
def test_odd_sides_get_their_last_line_twice(form: str) -> None:
    video = film(height=33, width=47)
    frames, _ = decoded(encode_video(video, form))
    assert frames.shape == (12, 34, 48, 3)
    assert np.abs(frames[:, :33, :47].astype(int) - video.frames).mean() < 8


@pytest.mark.parametrize("form", VIDEO_FORMATS)
def test_the_same_frames_and_sound_are_the_same_file(form: str) -> None:
    """Whatever was in the memory that an encoder is given: some have read what nobody wrote."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    video = Video(pixels, 12.0, audio=Audio(tone(0.7, RATE), RATE))
    draws, others = random.Random(0), [bytearray()] * 50
    files = set()
    for _ in range(25):
        for index in draws.sample(range(50), 5):
            others[index] = bytearray(draws.randbytes(draws.randrange(200_000)))
        files.add(encode_video(video, form))
    assert len(files) == 1


@pytest.mark.parametrize("form", FILMS)
@pytest.mark.parametrize("channels", [1, 2])
def test_the_sound_goes_with_the_film(form: str, channels: int) -> None:
    sound = Audio(tone(1.0, RATE, channels), RATE)
    content = encode_video(film(audio=sound), form)
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.audio[0].channels == channels
    with VideoReader(io.BytesIO(content), "film") as reader:
        heard, rate = reader.sound(10.0)
    assert heard.shape[1] / rate == pytest.approx(1.0, abs=0.1)
    loudest = np.abs(np.fft.rfft(heard[0])).argmax() * rate / heard.shape[1]
    assert loudest == pytest.approx(330, abs=5) or channels == 2


@pytest.mark.parametrize(("form", "most"), [("gif", 12), ("webp", 8)])
@pytest.mark.parametrize("fps", [8.0, 24.0, 30.0])
def test_an_animation_lasts_as_long_as_the_video(form: str, most: float, fps: float) -> None:
    """most: levels that pixels are off on the average; a gif has 256 colours for all of these frames."""
    video = film(24, fps=fps)
    with Image.open(io.BytesIO(encode_video(video, form))) as image:
        shown = []
        for index in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(index)
            image.load()
            shown.append(image.info["duration"])
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - video.frames[index]).mean() < most
    assert len(shown) == 24 and sum(shown) == pytest.approx(24_000 / fps, abs=5)
    assert image.info.get("loop", 0) == 0


def test_a_gif_faster_than_browsers_show_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="gif: got 60 frames a second, expected at most 50"):
        encode_video(film(fps=60), "gif")


def test_one_frame_is_a_video_in_every_format() -> None:
    for form in VIDEO_FORMATS:
        assert len(encode_video(film(1), form)) > 100, form


@pytest.mark.parametrize("form", VIDEO_FORMATS)
def test_a_file_says_how_it_was_made(form: str, tmp_path: Path) -> None:
    (tmp_path / f"x.{form}").write_bytes(encode_video(film(), form, metadata=MADE))
    info = read_file_info(tmp_path / f"x.{form}")
    assert info.metadata == MADE
    assert re.fullmatch(
        r"(h264|vp9) video, 1\.\d\d s, 48x32, 12 frames a second|(GIF|WEBP) image, 48x32, 12 frames", info.content
    )
    assert b"roter" not in encode_video(film(), form)


def test_what_a_format_does_not_hold_is_refused_with_its_name() -> None:
    wide = Video(np.zeros((1, 2, 20_000, 3), np.uint8), 8)
    three = film(audio=Audio(np.zeros((3, 9), np.float32), RATE))
    cases = [
        (wide, "webp", "webp: Video"),
        (wide, "mp4", "mp4: Video"),
        (three, "mp4", "mp4: got a sound of 3 channels"),
    ]
    for video, form, words in cases:
        with pytest.raises(InvalidRequestError, match=words):
            encode_video(video, form)
    with pytest.raises(InvalidRequestError, match=r"format: got 'mp5' \(did you mean 'mp4'"):
        encode_video(film(), "mp5")


def test_a_format_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    with pytest.raises(InvalidRequestError, match="format: got 'mp4', but the installed FFmpeg has no libx264"):
        encode_video(film(), "mp4")


def test_save_writes_by_the_suffix_whole_or_not_at_all(tmp_path: Path) -> None:
    video = film()
    for form in VIDEO_FORMATS:
        video.save(tmp_path / f"x.{form.upper()}")
        assert (tmp_path / f"x.{form.upper()}").read_bytes()
    with pytest.raises(InvalidRequestError, match="avi"):
        video.save(tmp_path / "x.avi")
    with pytest.raises(InvalidRequestError, match="gif: got 60"):
        film(fps=60).save(tmp_path / "y.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.GIF", "x.MP4", "x.WEBM", "x.WEBP"]


# Notebooks


def test_a_notebook_plays_a_small_video_and_names_a_large_one() -> None:
    assert film()._repr_html_().startswith('<video controls loop src="data:video/mp4;base64,')
    large = Video(np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (200, 1024, 1024, 3)), 24)
    assert "too large to play here" in large._repr_html_()
    output = OmniOutput(request_id="r", status=RequestStatus.FINISHED, results={"s": StageResult(videos=(film(),))})
    assert "<video" in output._repr_html_() and [video.fps for video in output.videos] == [12.0]


# Memory

MEASURE = """
import sys, threading
import numpy as np
from vllm_omni import Video
from vllm_omni.media.video_encoding import encode_video

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

rows, columns = np.mgrid[0:256, 0:256]
frames = np.empty((240, 256, 256, 3), np.uint8)
for number in range(240):
    frames[number] = np.stack([rows + number, columns - number, rows + columns], -1) % 256
encode_video(Video(frames[:2], 24), sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = kilobytes("VmRSS:")
content = encode_video(Video(frames, 24), sys.argv[1])
print(frames.nbytes // 1024, kilobytes("VmHWM:") - before, len(content) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(("form", "most"), [("mp4", 1.0), ("webm", 1.0), ("gif", 1.0), ("webp", 2.0)])
def test_writing_takes_less_memory_than_one_copy_of_the_frames_as_floats(form: str, most: float) -> None:
    """most: times the frames themselves, 45 MiB; floats are four times them."""
    measured = subprocess.run([sys.executable, "-c", MEASURE, form], capture_output=True, text=True, check=True)
    frames, peak, _ = map(int, measured.stdout.split())
    assert peak < most * frames, f"{peak} kB for {frames} kB of frames"
