"""Video files: what their headers say, chosen frames, the sound track. Knows no request.

FFmpeg reads them through the file object alone, as one of FORMATS: playlists and other formats that name further files
or addresses are no videos here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
import numpy.typing as npt

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_files import AudioHeader, Samples

Frame = npt.NDArray[np.uint8]

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
MAX_MISSING_FRAMES = 2  # a container may count frames that no decoder shows
CODING_MARGIN = 64  # a codec rounds sizes up
EXPECTED = "MP4, MOV, WebM, MKV or AVI"
# wrong bytes in a file's tags do not keep it from being read: PyAV 19 replaces them by itself
READ_ANY_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What a video is before it is decoded."""

    height: int  # pixels as stored, before a rotation that the file asks for
    width: int
    num_frames: int
    fps: float  # its own frames per second
    sound: AudioHeader | None = None  # of its first audio track; None where it is silent

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps


class VideoReader:
    """A video file that is open for reading; a context manager.

    file: binary, seekable, at its beginning; it stays the caller's. name: how messages call it. Opening decodes
    nothing; InvalidRequestError for what is no video, or does not say its size and rate.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._name = name
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
        try:
            self._container = av.open(file, "r", options=options, **READ_ANY_TAGS)
        except (av.error.FFmpegError, ValueError) as error:
            raise InvalidRequestError(
                f"{name}: got a file that is no whole video ({_reason(error)}), expected {EXPECTED}"
            ) from None
        try:
            self.header = self._read_header()
        except BaseException:
            self._container.close()
            raise

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """The frames of these indices (ascending), uint8 [height, width, 3], turned as the file asks for;
        InvalidRequestError when the file is damaged or ends too early.
        """
        wanted = iter(indices)
        index = next(wanted, None)
        last: av.VideoFrame | None = None
        num_read = 0
        for frame in self._decoded():
            self._check_size(frame)
            last = frame
            while index == num_read:
                yield _upright(frame)
                index = next(wanted, None)
            num_read += 1
            if index is None:
                return
        while index is not None:
            if last is None or index >= num_read + MAX_MISSING_FRAMES:
                raise InvalidRequestError(
                    f"{self._name}: got a truncated video, {num_read} of {self.header.num_frames} frames can be read; "
                    "save or copy it again"
                )
            yield _upright(last)
            index = next(wanted, None)

    def sound(self, max_s: float) -> tuple[Samples, int]:
        """The first sound track, all channels averaged: float32 [1, n] and its rate; no more than max_s of it, and one
        sample more where there is more.
        """
        assert self.header.sound is not None
        rate = self.header.sound.sample_rate
        blocks, num_left = [], int(max_s * rate) + 1
        for block in self._sound_blocks():
            blocks.append(block[:num_left])
            num_left -= len(blocks[-1])
            if num_left <= 0:
                break
        return np.concatenate([*blocks, np.empty(0, np.float32)])[None], rate

    def _read_header(self) -> VideoHeader:
        if not self._container.streams.video:
            raise InvalidRequestError(f"{self._name}: got a file without pictures, expected a video ({EXPECTED})")
        stream = self._container.streams.video[0]
        if not _can_decode(stream):
            raise InvalidRequestError(
                f"{self._name}: got a video of an unknown codec, expected one that FFmpeg decodes"
            )
        rate = stream.average_rate or stream.guessed_rate
        if not rate or rate <= 0 or stream.width < 1 or stream.height < 1:
            raise InvalidRequestError(
                f"{self._name}: got a video that does not say its size and frame rate; save it again, as {EXPECTED}"
            )
        num_frames = stream.frames or self._count_packets()
        if num_frames < 1:
            raise InvalidRequestError(f"{self._name}: got a video without frames, expected at least one")
        fps = float(rate)
        return VideoHeader(stream.height, stream.width, num_frames, fps, self._sound_header(num_frames / fps))

    def _sound_header(self, video_s: float) -> AudioHeader | None:
        """video_s: the length of the video, which stands in where none is said of the sound."""
        if not self._container.streams.audio:
            return None
        stream = self._container.streams.audio[0]
        if not _can_decode(stream):
            raise InvalidRequestError(
                f"{self._name}: got a video with sound of an unknown codec, expected one that FFmpeg decodes"
            )
        length_s = video_s
        if stream.duration is not None and stream.time_base is not None:
            length_s = float(stream.duration * stream.time_base)
        elif self._container.duration is not None:
            length_s = self._container.duration / av.time_base
        return AudioHeader(stream.rate, stream.channels, max(0, round(length_s * stream.rate)))

    def _count_packets(self) -> int:
        """For containers that do not say how many frames they hold."""
        try:
            return sum(packet.size > 0 for packet in self._container.demux(video=0))
        except av.error.FFmpegError as error:
            raise self._damaged(error) from None

    def _decoded(self) -> Iterator[av.VideoFrame]:
        # A stream may hold other sizes than its header names; the decoder is to refuse them before it makes room.
        max_pixels = (self.header.height + CODING_MARGIN) * (self.header.width + CODING_MARGIN)
        self._container.streams.video[0].codec_context.options = {"max_pixels": str(max_pixels)}
        try:
            self._container.seek(0)
            yield from self._container.decode(video=0)
        except av.error.FFmpegError as error:
            raise self._damaged(error) from None

    def _sound_blocks(self) -> Iterator[Samples]:
        """[n] each, whatever the codec gives."""
        as_floats = av.AudioResampler(format="fltp")
        try:
            self._container.seek(0)
            for frame in self._container.decode(audio=0):
                for part in as_floats.resample(frame):
                    yield part.to_ndarray().mean(axis=0, dtype=np.float32)
        except av.error.FFmpegError as error:
            raise self._damaged(error) from None

    def _check_size(self, frame: av.VideoFrame) -> None:
        if (frame.height, frame.width) != (self.header.height, self.header.width):
            raise InvalidRequestError(
                f"{self._name}: got a frame of {frame.width}x{frame.height} pixels in a video of "
                f"{self.header.width}x{self.header.height}, expected one size; save it again"
            )

    def _damaged(self, error: Exception) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self._name}: got a video that is damaged or truncated ({_reason(error)}); save or copy it again"
        )

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()


def _can_decode(stream: av.VideoStream | av.AudioStream) -> bool:
    """A stream of a codec that FFmpeg does not know has no context, though the types promise one."""
    context: object = stream.codec_context
    return context is not None


def _upright(frame: av.VideoFrame) -> Frame:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _reason(error: Exception) -> str:
    """FFmpeg's own words; the exception's text would add what it calls the file."""
    return str(error.strerror) if isinstance(error, av.error.FFmpegError) else "it cannot be opened"
