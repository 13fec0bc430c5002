"""Films are read by the times of their frames, whatever rate their headers claim; limits count real seconds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from support.media import video_bytes

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.messages import MediaPart
from vllm_omni.media.video_files import VideoReader
from vllm_omni.media.video_input import FrameSettings, VideoInput

SETTINGS = FrameSettings(step=2, min_frames=2, max_frames=64, fit=lambda height, width, name: (height, width))
LIMITS = LimitsConfig(max_video_s=30.0, max_video_frames=2_000)


def shade(index: int) -> np.ndarray[Any, Any]:
    return np.full((24, 40, 3), index, np.uint8)


def film(times_ms: Sequence[int], form: str = "webm", shades: Sequence[int] | None = None) -> bytes:
    """A frame at each time, its shade its number."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream("libvpx" if form == "webm" else "libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 24, 40, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(shade(index % 256 if shades is None else shades[index]), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def as_recorded(content: bytes) -> bytes:
    """Without default duration and duration, as browsers write: both become elements that mean nothing."""
    at = content.find(b"\x23\xe3\x83\x84")
    if at > 0:
        content = content[:at] + b"\xec\x86" + content[at + 2 :]
    at = content.find(b"\x44\x89\x88")
    return content if at < 0 else content[:at] + b"\xec\x89" + content[at + 2 :]


def read(content: bytes, fps: float = 2.0, limits: LimitsConfig = LIMITS) -> list[int]:
    """The shades of the frames that are picked."""
    part = MediaPart("video", content, "video", fps)
    reader = VideoInput(SETTINGS, limits)
    found = reader.read(part, reader.plan(part), False, lambda: None).frames
    return [round(float(frame.float().mean())) for frame in found]


def test_a_recording_of_a_browser_is_read_by_its_times() -> None:
    times = [33 * index for index in range(240)]  # 7.9 s
    recorded = as_recorded(film(times))
    with av.open(io.BytesIO(recorded)) as container:
        assert container.duration is None
    with VideoReader(io.BytesIO(recorded), "video") as reader:
        assert abs(reader.header.duration_s - 7.92) < 0.1 and reader.header.num_frames == 240
    found = read(recorded)
    assert len(found) == 14
    expected = [index * 7.92 / 14 * 1000 / 33 for index in range(14)]
    assert np.abs(np.array(found) - expected).max() <= 3


@pytest.mark.parametrize("form", ["webm", "matroska", "mp4"])
def test_a_variable_rate_shows_what_stood_there_at_the_time(form: str) -> None:
    # a second of many frames, then nine seconds of one picture, then another
    times = [*range(0, 1000, 40), 1000, 9960]
    found = read(film(times, form, shades=[10] * 25 + [100, 200]), fps=1.0)
    assert len(found) >= 8 and abs(found[0] - 10) < 4
    still = [shade for shade in found if abs(shade - 100) < 4]
    assert len(still) >= len(found) - 3, found


def test_limits_count_real_seconds() -> None:
    slow = as_recorded(film([500 * index for index in range(80)]))  # 40 s in 80 frames
    with pytest.raises(InvalidRequestError, match=r"video: got 40\.\d\d s, expected at most 30 s"):
        read(slow)
    fast = as_recorded(film([5 * index for index in range(1500)]))  # 7.5 s in 1500 frames
    assert 12 <= len(read(fast)) <= 16


def test_the_last_picture_of_a_still_film_lasts_as_long_as_most() -> None:
    still = as_recorded(film([0, 33, 66, 29_000]))
    with VideoReader(io.BytesIO(still), "video") as reader:
        assert abs(reader.header.duration_s - 29.03) < 0.05
    assert len(read(still)) > 1, "within the limit of 30 s"


@pytest.mark.parametrize(("codec", "form"), [("mpeg4", "mp4"), ("mpeg4", "avi"), ("h263", "3gp"), ("h263", "avi")])
def test_small_films_of_old_codecs_are_read(codec: str, form: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 144, 176, "yuv420p"
        for index in range(25):
            picture = np.full((144, 176, 3), 5 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    found = read(file.getvalue())
    assert len(found) == 2 and found[0] <= 3 and abs(found[1] - 60) <= 6


@pytest.mark.parametrize("form", ["mp4", "webm"])
@pytest.mark.parametrize("fps", [1, 4, 24, 30])
def test_a_constant_rate_picks_the_frames_of_these_numbers(form: str, fps: int) -> None:
    content = video_bytes([shade(5 * index) for index in range(48)], fps, form=form)
    with VideoReader(io.BytesIO(content), "video") as reader:
        assert reader.header.fps == fps and reader.header.num_frames == 48
        found = [round(float(frame.mean())) for frame in reader.frames([0, 1, 7, 20, 47])]
    assert np.abs(np.array(found) - [0, 5, 35, 100, 235]).max() <= 3


def test_a_film_that_begins_late_is_read_from_its_first_frame() -> None:
    found = read(film([5_000 + 100 * index for index in range(40)], "matroska"), fps=2.0)
    assert len(found) in (6, 8) and found[0] <= 2 and abs(found[3] - 3 * 40 / len(found)) <= 3


def test_one_frame_is_a_film() -> None:
    for content in (film([0]), as_recorded(film([0]))):
        assert len(read(content)) == 1
