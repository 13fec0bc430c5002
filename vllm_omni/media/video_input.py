"""What comes in as a video: from whatever a caller passes to chosen frames, each resized as soon as it is decoded, and
the sound track. Headers are measured against every limit before anything is decoded. Knows no model.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_files import AudioHeader, Samples
from vllm_omni.media.image_input import check_pixels, image_size, read_image, resized
from vllm_omni.media.messages import MediaPart
from vllm_omni.media.source_files import caller_media, check_num_bytes, num_bytes_of, open_source_file
from vllm_omni.media.video_files import VideoHeader, VideoReader

DEFAULT_FPS = 2.0
SOURCES = (
    "a path, the bytes of a file, a list of frames (PIL images or arrays) or a numpy array uint8 [frames, height, "
    "width, 3]"
)


@dataclass(frozen=True, slots=True)
class FrameSettings:
    """How a model wants the frames of a video."""

    step: int  # as many frames, or a multiple of them, are picked
    min_frames: int
    max_frames: int
    fit: Callable[[int, int, str], tuple[int, int]]  # (height, width, what messages call it) -> the size to resize to


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """What will be read of a video."""

    indices: tuple[int, ...]  # the frames that are picked
    size: tuple[int, int]  # (height, width) as stored, before the model's own resizing
    fps: float  # frames per second that the model is to see
    header: VideoHeader | None = None  # of a file

    @property
    def audio(self) -> AudioHeader | None:
        """The header of its sound track, None where there is none."""
        return None if self.header is None else self.header.sound


@dataclass(frozen=True, slots=True)
class ReadVideo:
    """What has been read of a video."""

    frames: Tensor  # uint8 [T, 3, height, width], resized
    audio: tuple[Samples, int] | None = None  # float32 [1, n] and its rate; cut one sample beyond the limit


class VideoInput:
    """Reads the videos of requests, within limits, as one checkpoint wants them."""

    def __init__(self, settings: FrameSettings, limits: LimitsConfig) -> None:
        self._settings = settings
        self._limits = limits

    @caller_media()
    def plan(self, part: MediaPart) -> VideoPlan:
        """From headers alone; InvalidRequestError for what is no video or beyond the limits."""
        if isinstance(part.source, np.ndarray | list | tuple):
            return self._plan_frames(part)
        with self._opened(part) as reader:
            return self._plan_file(reader.header, part)

    @caller_media()
    def read(self, part: MediaPart, plan: VideoPlan, with_audio: bool, stop: Callable[[], None]) -> ReadVideo:
        """What the plan of this part says, in one pass; with_audio: of a file that has a sound track. stop: called
        between frames; raises where nobody wants them any more.
        """
        if plan.header is None:
            frames = (read_image(frame, self._limits, part.name) for frame in part.source)
            return ReadVideo(self._resized(frames, part.name, stop))
        with self._opened(part) as reader:
            if reader.header != plan.header:
                raise InvalidRequestError(
                    f"{part.name}: got a file that has changed since it was checked; leave it as it is until the "
                    "request is done"
                )
            small = self._resized(map(torch.from_numpy, reader.frames(plan.indices)), part.name, stop)
            return ReadVideo(small, reader.sound(self._limits.max_audio_s) if with_audio else None)

    def _plan_frames(self, part: MediaPart) -> VideoPlan:
        frames = part.source
        if isinstance(frames, np.ndarray) and (frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8):
            raise InvalidRequestError(
                f"{part.name}: got an array {frames.dtype} {list(frames.shape)}, expected uint8 [frames, height, "
                "width, 3]"
            )
        if not len(frames):
            raise InvalidRequestError(f"{part.name}: got a video without frames, expected at least one")
        fps = DEFAULT_FPS if part.fps is None else part.fps
        self._check_length(len(frames), fps, part.name)
        if isinstance(frames, np.ndarray):
            self._check_num_bytes(frames.nbytes, part.name)
            sizes = {(frames.shape[1], frames.shape[2])}
        else:
            sizes = {self._frame_size(frame, f"{part.name}[{index}]") for index, frame in enumerate(frames)}
        if len(sizes) > 1:
            raise InvalidRequestError(f"{part.name}: got frames of {len(sizes)} sizes, expected one size")
        size = sizes.pop()
        check_pixels(*size, self._limits, part.name)
        return VideoPlan(tuple(range(len(frames))), size, fps)

    def _frame_size(self, frame: object, name: str) -> tuple[int, int]:
        if not isinstance(frame, np.ndarray | Image.Image):
            raise InvalidRequestError(f"{name}: got {type(frame).__name__}, expected a PIL image or a numpy array")
        return image_size(frame, self._limits, name)

    def _plan_file(self, header: VideoHeader, part: MediaPart) -> VideoPlan:
        check_pixels(header.height, header.width, self._limits, part.name)
        self._check_length(header.num_frames, header.fps, part.name)
        fps = DEFAULT_FPS if part.fps is None else part.fps
        indices = picked_frames(header.num_frames, header.fps, fps, self._settings)
        return VideoPlan(tuple(indices), (header.height, header.width), fps, header)

    def _check_length(self, num_frames: int, fps: float, name: str) -> None:
        limits = self._limits
        if num_frames > limits.max_video_frames:
            raise InvalidRequestError(
                f"{name}: got {num_frames} frames, expected at most {limits.max_video_frames} "
                "(limits.max_video_frames); cut it"
            )
        if num_frames > limits.max_video_s * fps:
            raise InvalidRequestError(
                f"{name}: got {num_frames / fps:.2f} s, expected at most {limits.max_video_s:g} s "
                "(limits.max_video_s); cut it"
            )

    def _check_num_bytes(self, num_bytes: int, name: str) -> None:
        check_num_bytes(num_bytes, self._limits.max_video_mb, name, "max_video_mb")

    @contextmanager
    def _opened(self, part: MediaPart) -> Iterator[VideoReader]:
        source = part.source
        if isinstance(source, str | os.PathLike):
            with open_source_file(source, part.name, "a video file") as file:
                self._check_num_bytes(num_bytes_of(file), part.name)
                with VideoReader(file, part.name) as reader:
                    yield reader
        elif isinstance(source, bytes | bytearray | memoryview):
            self._check_num_bytes(memoryview(source).nbytes, part.name)
            with VideoReader(io.BytesIO(source), part.name) as reader:
                yield reader
        else:
            raise InvalidRequestError(f"{part.name}: got {type(source).__name__}, expected {SOURCES}")

    def _resized(self, frames: Iterator[Tensor], name: str, stop: Callable[[], None]) -> Tensor:
        small: list[Tensor] = []
        size: tuple[int, int] | None = None
        for frame in frames:
            stop()
            if size is None:
                size = self._settings.fit(frame.shape[0], frame.shape[1], name)
            small.append(resized(frame, size))
        return torch.stack(small)


def picked_frames(num_frames: int, source_fps: float, fps: float, settings: FrameSettings) -> Sequence[int]:
    """Frames at `fps` per second, at least and at most as many as the settings say, as even as whole indices allow."""
    step = settings.step
    if num_frames < step:
        return range(num_frames)
    most = min(settings.max_frames, num_frames) // step * step
    wanted = min(max(num_frames / source_fps * fps, settings.min_frames), most)
    num_picked = max(int(wanted) // step, 1) * step
    indices: list[int] = torch.arange(0, num_frames, num_frames / num_picked).int().tolist()
    return indices[:num_picked]
