"""Videos as the bytes of a file, written frame by frame, with what they say of how they were made. Knows no request and
no path.

FFmpeg writes MP4 and WebM, with the sound; Pillow the animations GIF and WebP, which are silent.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO, cast

import av
import av.error
import numpy as np
from PIL import Image

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_track import LAYOUTS, AudioTrack, SampleFormat
from vllm_omni.media.containers import container_reason
from vllm_omni.media.image_encoding import animation_tags
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.media.video import Frames, Video
from vllm_omni.params import MAX_FPS
from vllm_omni.utils.checks import brief, did_you_mean

MAX_RATE_DENOMINATOR = 1_001  # of a rate such as 24000/1001
PALETTE_FRAMES = 8  # of a gif, by which its colours are chosen
PALETTE_PIXELS = 100_000  # of all these frames, about
SAME_BYTES = {"fflags": "+bitexact"}  # of the same frames: a webm would have a number that is drawn
BT709, LIMITED_RANGE = 1, 1  # as H.273 numbers them; what players take for granted of large pictures only


@dataclass(frozen=True, slots=True)
class _Codecs:
    """What FFmpeg makes of frames and sound."""

    video: str
    options: Mapping[str, str]
    audio: str
    samples: SampleFormat


@dataclass(frozen=True, slots=True)
class _Animation:
    """What Pillow writes. tick_ms: a frame is shown for a whole number of them."""

    tick_ms: int
    max_fps: float
    options: Mapping[str, Any] = field(default_factory=dict)


# Near lossless to the eye (18 of 51, 24 of 63). x264's plan of what later blocks will copy (mbtree) reads memory that
# nobody wrote: with it one file in three is another one at 160 pixels, without it files are a quarter larger. Browsers
# show a frame of a GIF for a tenth of a second where it asks for less than two hundredths.
VIDEO_FORMATS: Mapping[str, _Codecs | _Animation] = {
    "mp4": _Codecs("libx264", {"crf": "18", "preset": "fast", "x264-params": "mbtree=0"}, "aac", SampleFormat("fltp")),
    "webm": _Codecs(
        "libvpx-vp9", {"crf": "24", "b": "0", "cpu-used": "5", "row-mt": "1"}, "libopus", SampleFormat("flt")
    ),
    "gif": _Animation(10, 50.0),
    "webp": _Animation(1, MAX_FPS, {"quality": 90}),
}
VIDEO_SUFFIXES = {f".{name}": name for name in VIDEO_FORMATS}


def encode_video(video: Video, format: str, *, metadata: MediaMetadata | None = None) -> bytes:
    """The bytes of a file.

    format: a key of VIDEO_FORMATS. mp4 and webm have even sides: an odd one gets its last row or column twice. gif and
    webp leave the sound out; a gif has at most 50 frames a second. metadata: goes to the comment, of a webp to the
    UserComment. InvalidRequestError for an unknown format, one that the installed libraries do not write, and rates,
    sizes and sounds that it does not hold.
    """
    check_video_format(format)
    form = VIDEO_FORMATS[format]
    try:
        return (
            _encoded(video, format, form, metadata)
            if isinstance(form, _Codecs)
            else _animated(video, format, form, metadata)
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        reason = container_reason(error) if isinstance(error, av.error.FFmpegError) else error
        raise InvalidRequestError(f"{format}: {video!r} cannot be written ({reason}); choose another format") from error


def check_video_format(format: str) -> None:
    """InvalidRequestError for a format that cannot be written here."""
    if format not in VIDEO_FORMATS:
        raise InvalidRequestError(f"format: got {brief(format)}{did_you_mean(str(format)[:80], VIDEO_FORMATS)}")
    form = VIDEO_FORMATS[format]
    if isinstance(form, _Codecs) and form.video not in av.codecs_available:
        raise InvalidRequestError(
            f"format: got {format!r}, but the installed FFmpeg has no {form.video}; choose another format"
        )


def _encoded(video: Video, format: str, form: _Codecs, metadata: MediaMetadata | None) -> bytes:
    """Frames and sound in turns, so that neither waits in memory for the other."""
    file = io.BytesIO()
    with av.open(cast(BinaryIO, file), "w", format=format, options=SAME_BYTES) as container:
        if metadata is not None:
            container.metadata["comment"] = metadata.to_text()
        rate = Fraction(video.fps).limit_denominator(MAX_RATE_DENOMINATOR)
        stream = cast(av.VideoStream, container.add_stream(form.video, rate=rate, options=dict(form.options)))
        stream.width, stream.height = _even(video.width), _even(video.height)
        stream.pix_fmt = "yuv420p"
        _say_colours(stream.codec_context)
        sound = _Sound(container, form, format, video) if video.audio is not None else None
        for index, frame in enumerate(video.frames):
            picture = _frame(frame)
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
            if sound is not None:
                sound.write_until((index + 1) / video.fps)
        container.mux(stream.encode(None))
        if sound is not None:
            sound.close()
    return file.getvalue()


class _Sound:
    """The sound of a video beside its frames; what is longer than they are goes on behind them."""

    def __init__(self, container: av.container.OutputContainer, form: _Codecs, format: str, video: Video) -> None:
        assert video.audio is not None
        self._audio, channels = video.audio, video.audio.num_channels
        if channels not in LAYOUTS:
            raise InvalidRequestError(f"{format}: got a sound of {channels} channels, expected 1 or 2")
        self._track = AudioTrack(container, form.audio, self._audio.sample_rate, channels, form.samples)
        self._num_written = 0

    def write_until(self, time_s: float) -> None:
        self._write(round(time_s * self._audio.sample_rate))

    def close(self) -> None:
        self._write(self._audio.samples.shape[1])
        self._track.close()

    def _write(self, stop: int) -> None:
        self._track.write(self._audio.samples[:, self._num_written : stop])
        self._num_written = max(self._num_written, stop)


def _say_colours(context: av.VideoCodecContext) -> None:
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED_RANGE


def _frame(pixels: Frames) -> av.VideoFrame:
    """pixels: [height, width, 3]."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


def _even(side: int) -> int:
    return side + side % 2


def _animated(video: Video, format: str, form: _Animation, metadata: MediaMetadata | None) -> bytes:
    if video.fps > form.max_fps:
        raise InvalidRequestError(
            f"{format}: got {video.fps:g} frames a second, expected at most {form.max_fps:g}; choose another format"
        )
    file = io.BytesIO()
    pictures = _of_one_palette(video) if format == "gif" else map(Image.fromarray, video.frames)
    next(pictures).save(
        file,
        format.upper(),
        save_all=True,
        append_images=pictures,
        duration=list(_durations_ms(video, form.tick_ms)),
        loop=0,
        **form.options,
        **animation_tags(format, metadata),
    )
    return file.getvalue()


def _of_one_palette(video: Video) -> Iterator[Image.Image]:
    """With the 256 colours that suit some frames spread over the whole: a palette of its own for each frame takes a
    hundred times as long, and flickers. Without dithering, which flickers too.
    """
    chosen = np.unique(np.linspace(0, video.num_frames - 1, PALETTE_FRAMES).astype(int))
    stride = math.isqrt(video.height * video.width * len(chosen) // PALETTE_PIXELS) + 1
    sample = np.concatenate([video.frames[index, ::stride, ::stride] for index in chosen])
    palette = Image.fromarray(sample).quantize(256, method=Image.Quantize.MEDIANCUT)
    return (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in video.frames)


def _durations_ms(video: Video, tick_ms: int) -> Iterator[int]:
    """How long each frame is shown; their sum is never off by more than half a tick."""
    ticks = [round(index * 1000 / (video.fps * tick_ms)) for index in range(video.num_frames + 1)]
    return (tick_ms * (stop - start) for start, stop in zip(ticks, ticks[1:], strict=False))
