"""Messages with images, audio and videos -> the prompt of one checkpoint: Qwen2.5-Omni's processor.

Reads sources and counts tokens; knows no model, only its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_input import check_audio, read_audio
from vllm_omni.media.image_input import image_size, read_image, resized
from vllm_omni.media.messages import MediaPart, media_parts, without_sources
from vllm_omni.media.video_input import VideoInput, VideoPlan
from vllm_omni.models.qwen2_5_omni.audio_features import AudioFeatures, tokens_of_frames
from vllm_omni.models.qwen2_5_omni.media_tokens import MediaTokens
from vllm_omni.models.qwen2_5_omni.positions import MediaSpan, rope_index
from vllm_omni.models.qwen2_5_omni.vision import VisionGrid, VisionSettings
from vllm_omni.request import Messages, OmniRequest
from vllm_omni.utils.checks import brief
from vllm_omni.worker.ar.chat import Chat
from vllm_omni.worker.ar.media_prompt import MediaItem, MediaPrompt, content_ids_of
from vllm_omni.worker.ar.prompt_reader import Encode, PromptReader
from vllm_omni.worker.background import Stop

USE_AUDIO_IN_VIDEO = "use_audio_in_video"  # whether a video file brings its sound track


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One part, measured: its span as its header tells it."""

    part: MediaPart
    span: MediaSpan
    video: VideoPlan | None = None


@dataclass(frozen=True, slots=True)
class OmniPromptPlan:
    """A prompt whose media have been measured."""

    token_ids: Sequence[int]  # of the chat template, one placeholder for each part
    parts: Sequence[PlannedPart]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + sum(planned.span.num_tokens - 1 for planned in self.parts)


@dataclass(frozen=True, slots=True)
class MediaContent:
    """One part, read."""

    span: MediaSpan
    inputs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # of the encoders, by kind


class OmniPromptReader(PromptReader[OmniPromptPlan]):
    """Makes prompts for the checkpoint in `folder`."""

    input_media = frozenset({"image", "audio", "video"})
    request_keys = frozenset({USE_AUDIO_IN_VIDEO})

    def __init__(self, folder: Path, encode: Encode, limits: LimitsConfig) -> None:
        self._encode = encode
        self._limits = limits
        self._tokens = MediaTokens.of(folder)
        self._vision = VisionSettings.of(folder)
        self._audio = AudioFeatures(folder)
        self._videos = VideoInput(self._vision.frames, limits)

    def plan(self, messages: Messages, request: OmniRequest) -> OmniPromptPlan:
        parts = media_parts(messages)
        num_images = sum(part.kind == "image" for part in parts)
        if num_images > self._limits.max_images:
            raise InvalidRequestError(
                f"messages: got {num_images} images, expected at most {self._limits.max_images} (limits.max_images)"
            )
        use_audio_in_video = _use_audio_in_video(request)
        planned = [self._measure(part, use_audio_in_video) for part in parts]
        token_ids = self._encode(Chat.of(without_sources(messages), request.fields))
        self._check_placeholders(token_ids, [part.kind for part in parts])
        return OmniPromptPlan(token_ids, planned)

    def read(self, plan: OmniPromptPlan, stop: Stop) -> MediaPrompt:
        contents = [self._read(planned, stop) for planned in plan.parts]
        token_ids, placed = self._expand(plan.token_ids, [content.span for content in contents])
        positions, delta = rope_index(len(token_ids), placed, self._tokens.clock)
        items = tuple(
            item
            for (start, span), content in zip(placed, contents, strict=True)
            for item in self._items(start, span, content)
        )
        stop()
        return MediaPrompt(token_ids, content_ids_of(token_ids, items), positions, delta, items)

    def check_request(self, request: OmniRequest) -> None:
        _use_audio_in_video(request)

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if token in self._tokens.placeholders.values():
                raise InvalidRequestError(
                    f"prompt: got the token id {token}, which stands for media; give messages with the media in them"
                )

    def _check_placeholders(self, token_ids: Sequence[int], kinds: Sequence[str]) -> None:
        """Whether the template wrote one placeholder for each part, and the texts none."""
        known = {token: kind for kind, token in self._tokens.placeholders.items()}
        found = [known[token] for token in token_ids if token in known]
        if found != list(kinds):
            raise InvalidRequestError(
                f"messages: got the media {list(kinds)}, but placeholders for {found} in the text of the chat "
                "template; take the placeholders out of the texts"
            )

    def _expand(
        self, short: Sequence[int], spans: Sequence[MediaSpan]
    ) -> tuple[list[int], list[tuple[int, MediaSpan]]]:
        """Token ids with every placeholder replaced, and where each span begins."""
        placeholders = frozenset(self._tokens.placeholders.values())
        token_ids: list[int] = []
        placed: list[tuple[int, MediaSpan]] = []
        remaining = iter(spans)
        for token in short:
            if token not in placeholders:
                token_ids.append(token)
                continue
            span = next(remaining)
            placed.append((len(token_ids), span))
            token_ids += self._tokens.of_span(span)
        return token_ids, placed

    def _items(self, start: int, span: MediaSpan, content: MediaContent) -> Iterator[MediaItem]:
        kinds = self._tokens.kinds_of_span(span)
        for kind, inputs in content.inputs.items():
            places = [start + offset for offset, own in enumerate(kinds) if own == kind]
            yield MediaItem(kind, torch.tensor(places), inputs)

    def _measure(self, part: MediaPart, use_audio_in_video: bool) -> PlannedPart:
        if part.kind == "image":
            size = self._vision.image.fit(*image_size(part.source, self._limits, part.name), part.name)
            return PlannedPart(part, MediaSpan("image", self._vision.image.tokens(1, size)))
        if part.kind == "audio":
            seconds = check_audio(part.source, channels=1, limits=self._limits, name=part.name)
            num_tokens = self._audio.num_tokens(seconds, part.name)
            return PlannedPart(part, MediaSpan("audio", num_audio_tokens=num_tokens))
        plan = self._videos.plan(part)
        size = self._vision.video.fit(*plan.size, part.name)
        has_track = use_audio_in_video and plan.audio is not None
        return PlannedPart(part, self._video_span(plan, size, self._track_tokens(plan, part) if has_track else 0), plan)

    def _read(self, planned: PlannedPart, stop: Stop) -> MediaContent:
        stop()
        part = planned.part
        if planned.video is not None:
            return self._read_video(part, planned.video, planned.span.has_track, stop)
        if part.kind == "image":
            return self._read_image(part)
        features, num_tokens = self._features(part.source, part.name)
        return MediaContent(MediaSpan("audio", num_audio_tokens=num_tokens), {"audio": {"features": features}})

    def _read_image(self, part: MediaPart) -> MediaContent:
        grid = self._vision.image
        pixels = read_image(part.source, self._limits, part.name)
        size = grid.fit(pixels.shape[0], pixels.shape[1], part.name)
        inputs = _grid_inputs(grid, resized(pixels, size)[None], size)
        return MediaContent(MediaSpan("image", grid.tokens(1, size)), {"image": inputs})

    def _read_video(self, part: MediaPart, plan: VideoPlan, has_track: bool, stop: Stop) -> MediaContent:
        grid = self._vision.video
        read = self._videos.read(part, plan, has_track, stop)
        size = (read.frames.shape[2], read.frames.shape[3])
        num_audio_tokens, track = 0, {}
        if read.audio is not None:
            features, num_audio_tokens = self._features(read.audio, _track_name(part))
            track = {"audio": {"features": features}}
        span = self._video_span(plan, size, num_audio_tokens)
        inputs = {**_grid_inputs(grid, read.frames, size), "second_per_grid": torch.tensor(span.second_per_grid)}
        return MediaContent(span, {"video": inputs, **track})

    def _video_span(self, plan: VideoPlan, size: tuple[int, int], num_audio_tokens: int) -> MediaSpan:
        grid = self._vision.video
        seconds = grid.temporal_patch_size / plan.fps
        return MediaSpan("video", grid.tokens(len(plan.indices), size), seconds, num_audio_tokens)

    def _features(self, source: object, name: str) -> tuple[Tensor, int]:
        """The features [mel, frames] of an audio and their number of tokens."""
        rate = self._audio.sample_rate
        samples = read_audio(source, sample_rate=rate, channels=1, limits=self._limits, name=name)
        self._audio.num_tokens(samples.shape[1] / rate, name)
        features = self._audio.features(samples)
        return features, tokens_of_frames(features.shape[1])

    def _track_tokens(self, plan: VideoPlan, part: MediaPart) -> int:
        """Of a video's sound track, as its header says; InvalidRequestError for one beyond the limits."""
        assert plan.audio is not None
        if plan.audio.duration_s > self._limits.max_audio_s:
            raise InvalidRequestError(
                f"{part.name}: got {plan.audio.duration_s:.2f} s of sound in a video, expected at most "
                f"{self._limits.max_audio_s:g} s (limits.max_audio_s); cut it, or set use_audio_in_video to false"
            )
        return self._audio.num_tokens(plan.audio.duration_s, _track_name(part))


def _use_audio_in_video(request: OmniRequest) -> bool:
    value = request.fields.get(USE_AUDIO_IN_VIDEO)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"{USE_AUDIO_IN_VIDEO}: got {brief(value)}, expected true or false")
    return bool(value)


def _track_name(part: MediaPart) -> str:
    return f"{part.name}'s sound track"


def _grid_inputs(grid: VisionGrid, frames: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """frames: uint8 [T, 3, *size]."""
    time = grid.tokens(len(frames), size)[0]
    thw = torch.tensor([time, size[0] // grid.patch_size, size[1] // grid.patch_size])
    return {"pixel_values": grid.patches(frames), "grid_thw": thw}
