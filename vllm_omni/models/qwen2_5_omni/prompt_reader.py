"""Messages with images, sounds and videos -> the prompt of one checkpoint: Qwen2.5-Omni's processor.

Reads sources and counts tokens; knows no model, only its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_input import check_audio, read_audio
from vllm_omni.media.image_input import image_size, read_image
from vllm_omni.media.messages import MediaPart, media_parts, without_sources
from vllm_omni.media.video_input import VideoInput, VideoPlan
from vllm_omni.models.qwen2_5_omni.audio_features import SoundFeatures, tokens_of_frames
from vllm_omni.models.qwen2_5_omni.media_tokens import MediaTokens
from vllm_omni.models.qwen2_5_omni.positions import MediaSpan, rope_index
from vllm_omni.models.qwen2_5_omni.vision import VisionGrid, VisionSettings, resized
from vllm_omni.request import Messages
from vllm_omni.worker.ar.media_prompt import MediaItem, MediaPrompt, content_ids_of


@dataclass(frozen=True, slots=True)
class MediaContent:
    """One part, read: its span, and the inputs of the encoders by kind."""

    span: MediaSpan
    inputs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


class MediaProcessor:
    """Makes prompts for the checkpoint in `folder`. text: its tokenizer with its chat template."""

    def __init__(self, folder: Path, text: TextProcessor, limits: LimitsConfig) -> None:
        self._text = text
        self._limits = limits
        self._tokens = MediaTokens.of(folder)
        self._vision = VisionSettings.of(folder)
        self._sound = SoundFeatures(folder)
        self._videos = VideoInput(self._vision, limits)

    def check(self, messages: Messages, use_audio_in_video: bool) -> int:
        """The number of tokens, from headers alone; InvalidRequestError for what they show to be wrong."""
        spans = [self._measure(part, use_audio_in_video) for part in self._parts(messages)]
        return len(self._expand(messages, spans)[0])

    def read(self, messages: Messages, use_audio_in_video: bool) -> MediaPrompt:
        """The prompt, everything decoded. use_audio_in_video: whether a video file brings its sound track.

        InvalidRequestError for anything that cannot be read or is beyond the limits.
        """
        contents = [self._read(part, use_audio_in_video) for part in self._parts(messages)]
        token_ids, placed = self._expand(messages, [content.span for content in contents])
        positions, delta = rope_index(len(token_ids), placed, self._tokens.clock)
        items = tuple(
            item
            for (start, span), content in zip(placed, contents, strict=True)
            for item in self._items(start, span, content)
        )
        return MediaPrompt(token_ids, content_ids_of(token_ids, items), positions, delta, items)

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """InvalidRequestError for placeholders in a prompt of bare token ids, which bring no media."""
        for token in token_ids:
            if token in self._tokens.placeholders.values():
                raise InvalidRequestError(
                    f"prompt: got the token id {token}, which stands for media; give messages with the media in them"
                )

    def _parts(self, messages: Messages) -> list[MediaPart]:
        parts = media_parts(messages)
        num_images = sum(part.kind == "image" for part in parts)
        if num_images > self._limits.max_images:
            raise InvalidRequestError(
                f"messages: got {num_images} images, expected at most {self._limits.max_images} (limits.max_images)"
            )
        return parts

    def _expand(self, messages: Messages, spans: Sequence[MediaSpan]) -> tuple[list[int], list[tuple[int, MediaSpan]]]:
        """Token ids with every placeholder replaced, and where each span begins."""
        kinds = {token: kind for kind, token in self._tokens.placeholders.items()}
        short = self._text.encode(without_sources(messages))
        found = [kinds[token] for token in short if token in kinds]
        if found != [span.kind for span in spans]:
            raise InvalidRequestError(
                f"messages: got the media {[span.kind for span in spans]}, but placeholders for {found} in the text of "
                "the chat template; take the placeholders out of the texts"
            )
        token_ids: list[int] = []
        placed: list[tuple[int, MediaSpan]] = []
        remaining = iter(spans)
        for token in short:
            if token not in kinds:
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

    def _measure(self, part: MediaPart, use_audio_in_video: bool) -> MediaSpan:
        if part.kind == "image":
            size = self._vision.image.fit(*image_size(part.source, self._limits, part.name), part.name)
            return MediaSpan("image", self._vision.image.tokens(1, size))
        if part.kind == "audio":
            seconds = check_audio(part.source, channels=1, limits=self._limits, name=part.name)
            return MediaSpan("audio", num_audio_tokens=self._sound.num_tokens(seconds, part.name))
        plan = self._videos.plan(part)
        size = self._vision.video.fit(*plan.size, part.name)
        has_track = use_audio_in_video and plan.sound is not None
        return self._video_span(plan, size, self._track_tokens(plan, part) if has_track else 0)

    def _read(self, part: MediaPart, use_audio_in_video: bool) -> MediaContent:
        if part.kind == "image":
            return self._read_image(part)
        if part.kind == "audio":
            features, num_tokens = self._features(part.source, part.name)
            return MediaContent(MediaSpan("audio", num_audio_tokens=num_tokens), {"audio": {"features": features}})
        return self._read_video(part, use_audio_in_video)

    def _read_image(self, part: MediaPart) -> MediaContent:
        grid = self._vision.image
        pixels = read_image(part.source, self._limits, part.name)
        size = grid.fit(pixels.shape[0], pixels.shape[1], part.name)
        inputs = _grid_inputs(grid, resized(pixels, size)[None], size)
        return MediaContent(MediaSpan("image", grid.tokens(1, size)), {"image": inputs})

    def _read_video(self, part: MediaPart, use_audio_in_video: bool) -> MediaContent:
        grid = self._vision.video
        plan = self._videos.plan(part)
        frames = self._videos.frames(part)
        size = (frames.shape[2], frames.shape[3])
        num_audio_tokens, sound = 0, {}
        if use_audio_in_video and plan.sound is not None:
            self._track_tokens(plan, part)
            features, num_audio_tokens = self._features(self._videos.sound(part), f"{part.name}'s sound track")
            sound = {"audio": {"features": features}}
        span = self._video_span(plan, size, num_audio_tokens)
        inputs = {**_grid_inputs(grid, frames, size), "second_per_grid": torch.tensor(span.second_per_grid)}
        return MediaContent(span, {"video": inputs, **sound})

    def _video_span(self, plan: VideoPlan, size: tuple[int, int], num_audio_tokens: int) -> MediaSpan:
        grid = self._vision.video
        seconds = grid.temporal_patch_size / plan.fps
        return MediaSpan("video", grid.tokens(len(plan.indices), size), seconds, num_audio_tokens)

    def _features(self, source: object, name: str) -> tuple[Tensor, int]:
        """The features [mel, frames] of a sound and their number of tokens."""
        rate = self._sound.sample_rate
        samples = read_audio(source, sample_rate=rate, channels=1, limits=self._limits, name=name)
        self._sound.num_tokens(samples.shape[1] / rate, name)
        features = self._sound.features(samples)
        return features, tokens_of_frames(features.shape[1])

    def _track_tokens(self, plan: VideoPlan, part: MediaPart) -> int:
        """Of a video's sound track, as its header says; InvalidRequestError for one beyond the limits."""
        assert plan.sound is not None
        if plan.sound.duration_s > self._limits.max_audio_s:
            raise InvalidRequestError(
                f"{part.name}: got {plan.sound.duration_s:.2f} s of sound in a video, expected at most "
                f"{self._limits.max_audio_s:g} s (limits.max_audio_s); cut it, or set use_audio_in_video to false"
            )
        return self._sound.num_tokens(plan.sound.duration_s, f"{part.name}'s sound track")


def _grid_inputs(grid: VisionGrid, frames: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """frames: uint8 [T, 3, *size]."""
    time = grid.tokens(len(frames), size)[0]
    thw = torch.tensor([time, size[0] // grid.patch_size, size[1] // grid.patch_size])
    return {"pixel_values": grid.patches(frames), "grid_thw": thw}
