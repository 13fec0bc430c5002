"""What is wrong with media of a request is told as one kind of error by all that read them, and never as another."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.media import image_bytes, picture, sound_bytes, tone, video_bytes

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import UnreadableMediaError
from vllm_omni.media.audio_input import read_audio
from vllm_omni.media.image_input import image_size, read_image, read_mask
from vllm_omni.media.messages import MediaPart
from vllm_omni.media.video_input import FrameSettings, VideoInput

LIMITS = LimitsConfig()
SOUND = sound_bytes(tone(0.2))
FILM = video_bytes([picture(32, 48, seed) for seed in range(4)], sound=tone(0.5))


def see(source: Any) -> list[Any]:
    image_size(source, LIMITS, "image")
    return [read_image(source, LIMITS, "image"), read_mask(source, LIMITS, "mask")]


def hear(source: Any) -> list[Any]:
    return [read_audio(source, sample_rate=24_000, channels=1, limits=LIMITS, name="ref_audio")]


def watch(source: Any) -> list[Any]:
    videos = VideoInput(FrameSettings(2, 2, 8, lambda height, width, name: (28, 28)), LIMITS)
    part = MediaPart("video", source, "messages[0].content[0].video")
    plan = videos.plan(part)
    read = videos.read(part, plan, plan.audio is not None, lambda: None)
    return [read.frames, read.audio and read.audio[0]]


READERS: dict[str, tuple[Callable[[Any], list[Any]], bytes]] = {
    "png": (see, image_bytes(picture())),
    "jpeg": (see, image_bytes(picture(), "JPEG")),
    "wav": (hear, SOUND),
    "sound of a video": (hear, FILM),
    "video": (watch, FILM),
}


@pytest.mark.parametrize(("read", "content"), READERS.values(), ids=READERS)
def test_whatever_is_damaged_is_unreadable_or_read(read: Callable[[Any], Any], content: bytes) -> None:
    chance, num_refused = random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(content[: chance.choice((len(content), chance.randrange(len(content))))])
        for _ in range(chance.randrange(6) if damaged else 0):
            damaged[chance.randrange(min(len(damaged), chance.choice((64, 10**9))))] = chance.randrange(256)
        try:
            read(bytes(damaged))
        except UnreadableMediaError:
            num_refused += 1
    assert num_refused > 10


@pytest.mark.parametrize(("read", "content"), READERS.values(), ids=READERS)
def test_a_data_uri_and_a_file_are_read_as_their_bytes(
    read: Callable[[Any], Any], content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for source in (f"data:x/y;base64,{base64.b64encode(content).decode()}", path):
        for found, expected in zip(read(source), read(content), strict=True):
            assert np.array_equal(found, expected)
