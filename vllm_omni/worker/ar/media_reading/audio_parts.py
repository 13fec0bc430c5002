"""Parts of messages of a model that sees and hears: pictures, videos with their sound where the request says so, and
audio. Counts tokens and knows no model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_files import Samples
from vllm_omni.media.audio_input import check_audio, read_audio
from vllm_omni.media.messages import MediaPart
from vllm_omni.media.video_input import VideoPlan
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief
from vllm_omni.worker.ar.media_reading.parts import MediaContent, PlannedPart, VisionParts
from vllm_omni.worker.ar.media_reading.reader import MediaPromptReader
from vllm_omni.worker.ar.media_reading.spans import MediaSpan
from vllm_omni.worker.ar.media_reading.tokens import MediaTokens
from vllm_omni.worker.ar.media_reading.vision import ImageArea, VisionSettings
from vllm_omni.worker.ar.prompt_reader import Encode
from vllm_omni.worker.background import Stop

USE_AUDIO_IN_VIDEO = "use_audio_in_video"  # whether a video file brings its sound track
VIDEO_TOKENS = (128, 768)  # of a frame; the processors of these models read them from no file


class AudioFeatures(Protocol):
    """How a family's audio encoder reads samples."""

    @property
    def sample_rate(self) -> int: ...

    def num_tokens(self, num_samples: int, name: str) -> int:
        """That they become; InvalidRequestError for what is too short or too long for the encoder."""

    def features(self, samples: Samples) -> Tensor:
        """samples: float32 [1, n] at `sample_rate`. Returns float32 [mel bins, frames], no padding."""


class AudioVisualReader(MediaPromptReader):
    """Makes prompts of pictures, videos and audio; a family says which tokens there are, and how audio is read."""

    input_media = VisionParts.input_media | {"audio"}
    request_keys = frozenset({USE_AUDIO_IN_VIDEO})

    def __init__(
        self,
        folder: Path,
        encode: Encode,
        limits: LimitsConfig,
        image_area: ImageArea | None,
        tokens: MediaTokens,
        audio: AudioFeatures,
    ) -> None:
        vision = VisionParts(VisionSettings.of(folder, VIDEO_TOKENS), limits, image_area)
        super().__init__(encode, limits, tokens, AudioVisualParts(vision, audio, limits))

    def check_request(self, request: OmniRequest) -> None:
        _use_audio_in_video(request)


class AudioVisualParts:
    """The PartReader of such a model."""

    def __init__(self, vision: VisionParts, audio: AudioFeatures, limits: LimitsConfig) -> None:
        self._limits = limits
        self._vision = vision
        self._audio = audio

    def measure(self, part: MediaPart, request: OmniRequest) -> PlannedPart:
        """See PartReader."""
        if part.kind == "audio":
            seconds = check_audio(part.source, channels=1, limits=self._limits, name=part.name)
            return PlannedPart(part, MediaSpan("audio", num_audio_tokens=self._num_tokens(seconds, part.name)))
        planned = self._vision.measure(part, request)
        plan = planned.video
        if plan is None or plan.audio is None or not _use_audio_in_video(request):
            return planned
        span = dataclasses.replace(planned.span, num_audio_tokens=self._track_tokens(plan, part))
        return dataclasses.replace(planned, span=span)

    def read(self, planned: PlannedPart, stop: Stop) -> MediaContent:
        """See PartReader."""
        stop()
        part = planned.part
        if part.kind == "audio":
            features, num_tokens = self._features(part.source, part.name)
            return MediaContent(MediaSpan("audio", num_audio_tokens=num_tokens), {"audio": {"features": features}})
        if planned.video is None or not planned.span.has_track:
            return self._vision.read(planned, stop)
        read = self._vision.read_frames(planned, True, stop)
        content = self._vision.video_content(planned.video, read)
        if read.audio is None:
            return content
        features, num_tokens = self._features(read.audio, _track_name(part))
        span = dataclasses.replace(content.span, num_audio_tokens=num_tokens)
        return MediaContent(span, {**content.inputs, "audio": {"features": features}})

    def _features(self, source: object, name: str) -> tuple[Tensor, int]:
        """The features [mel bins, frames] of an audio and their number of tokens."""
        rate = self._audio.sample_rate
        samples = read_audio(source, sample_rate=rate, channels=1, limits=self._limits, name=name)
        num_tokens = self._audio.num_tokens(samples.shape[1], name)
        return self._audio.features(samples), num_tokens

    def _track_tokens(self, plan: VideoPlan, part: MediaPart) -> int:
        """Of a video's sound track, as its header says; InvalidRequestError for one beyond the limits."""
        assert plan.audio is not None
        if plan.audio.duration_s > self._limits.max_audio_s:
            raise InvalidRequestError(
                f"{part.name}: got {plan.audio.duration_s:.2f} s of sound in a video, expected at most "
                f"{self._limits.max_audio_s:g} s (limits.max_audio_s); cut it, or set use_audio_in_video to false"
            )
        return self._num_tokens(plan.audio.duration_s, _track_name(part))

    def _num_tokens(self, duration_s: float, name: str) -> int:
        return self._audio.num_tokens(round(duration_s * self._audio.sample_rate), name)


def _use_audio_in_video(request: OmniRequest) -> bool:
    value = request.fields.get(USE_AUDIO_IN_VIDEO)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"{USE_AUDIO_IN_VIDEO}: got {brief(value)}, expected true or false")
    return bool(value)


def _track_name(part: MediaPart) -> str:
    return f"{part.name}'s sound track"
