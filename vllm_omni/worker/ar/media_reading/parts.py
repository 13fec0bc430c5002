"""One part of a message on its way to the encoders: measured by its header, then read. Pictures and videos are read
here; what else a family reads, it adds. Counts tokens and knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.image_input import fitted, image_size, read_image, resized
from vllm_omni.media.messages import MediaPart
from vllm_omni.media.video_input import ReadVideo, VideoInput, VideoPlan
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.media_reading.spans import MediaSpan
from vllm_omni.worker.ar.media_reading.vision import ImageArea, VisionGrid, VisionSettings
from vllm_omni.worker.background import Stop


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One part, measured: its span as its header tells it."""

    part: MediaPart
    span: MediaSpan
    video: VideoPlan | None = None


@dataclass(frozen=True, slots=True)
class MediaContent:
    """One part, read."""

    span: MediaSpan
    inputs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # of the encoders, by kind


class PartReader(Protocol):
    """Reads the parts of messages for one checkpoint, within limits."""

    def measure(self, part: MediaPart, request: OmniRequest) -> PlannedPart:
        """From headers alone; InvalidRequestError for what they show to be wrong."""

    def read(self, planned: PlannedPart, stop: Stop) -> MediaContent:
        """Everything decoded; InvalidRequestError for what cannot be read. Calls `stop` now and then."""


class VisionParts:
    """Pictures, and videos without their sound."""

    input_media: ClassVar[frozenset[str]] = frozenset({"image", "video"})

    def __init__(self, settings: VisionSettings, limits: LimitsConfig, image_area: ImageArea | None = None) -> None:
        """image_area: what pictures are resized to first."""
        self._settings = settings
        self._area = image_area
        self._limits = limits
        self._videos = VideoInput(settings.frames, limits)

    def measure(self, part: MediaPart, request: OmniRequest) -> PlannedPart:
        """See PartReader."""
        if part.kind == "image":
            return self._measure_image(part)
        if part.kind == "video":
            return self.measure_video(part)
        raise InvalidRequestError(
            f"{part.name}: got {part.kind}, expected text, {' or '.join(sorted(self.input_media))}: the model reads no "
            "other media; leave it out"
        )

    def read(self, planned: PlannedPart, stop: Stop) -> MediaContent:
        """See PartReader."""
        stop()
        if planned.video is None:
            return self._read_image(planned.part)
        return self.video_content(planned.video, self.read_frames(planned, False, stop))

    def measure_video(self, part: MediaPart) -> PlannedPart:
        """A video without its sound."""
        plan = self._videos.plan(part)
        return PlannedPart(part, self._video_span(plan, self._settings.video.fit(*plan.size, part.name)), plan)

    def read_frames(self, planned: PlannedPart, with_audio: bool, stop: Stop) -> ReadVideo:
        """Of a video, resized, and its sound track where that is wanted."""
        assert planned.video is not None
        return self._videos.read(planned.part, planned.video, with_audio, stop)

    def video_content(self, plan: VideoPlan, read: ReadVideo) -> MediaContent:
        """The frames of a video as its encoder reads them."""
        size = (read.frames.shape[2], read.frames.shape[3])
        span = self._video_span(plan, size)
        seconds = {"second_per_grid": torch.tensor(span.second_per_grid)}
        return MediaContent(span, {"video": {**_grid_inputs(self._settings.video, read.frames, size), **seconds}})

    def _measure_image(self, part: MediaPart) -> PlannedPart:
        grid = self._settings.image
        size = self._first_size(*image_size(part.source, self._limits, part.name))
        return PlannedPart(part, MediaSpan("image", grid.tokens(1, grid.fit(*size, part.name, part.max_pixels))))

    def _read_image(self, part: MediaPart) -> MediaContent:
        grid = self._settings.image
        pixels = read_image(part.source, self._limits, part.name)
        pixels = fitted(pixels, self._first_size(pixels.shape[0], pixels.shape[1]))
        size = grid.fit(pixels.shape[0], pixels.shape[1], part.name, part.max_pixels)
        inputs = _grid_inputs(grid, resized(pixels, size)[None], size)
        return MediaContent(MediaSpan("image", grid.tokens(1, size)), {"image": inputs})

    def _first_size(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self._area is None else self._area.fit(height, width)

    def _video_span(self, plan: VideoPlan, size: tuple[int, int]) -> MediaSpan:
        grid = self._settings.video
        return MediaSpan("video", grid.tokens(len(plan.indices), size), grid.temporal_patch_size / plan.fps)


def _grid_inputs(grid: VisionGrid, frames: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """frames: uint8 [T, 3, *size]."""
    time = grid.tokens(len(frames), size)[0]
    thw = torch.tensor([time, size[0] // grid.patch_size, size[1] // grid.patch_size])
    return {"pixel_values": grid.patches(frames), "grid_thw": thw}
