"""Video files: what their headers say, chosen frames, the sound track. Knows no request.

FFmpeg reads them through the file object alone, as one of FORMATS: playlists and other formats that name further files
or addresses are no videos here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low
from typing import BinaryIO

import av
import av.error
import numpy as np
import numpy.typing as npt

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_containers import track_blocks
from vllm_omni.media.audio_files import AudioHeader, Samples
from vllm_omni.media.containers import can_decode, container_reason, container_to_keep
from vllm_omni.media.mixing import check_channels, mixed

Frame = npt.NDArray[np.uint8]

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
MAX_MISSING_FRAMES = 2  # a container may count frames that no decoder shows
MAX_RATE_ERROR = 1.5  # frames that a rate may make the whole longer or shorter
CODING_MARGIN = 256  # a codec rounds sizes up, and old ones (MPEG-4, H.263) keep room around each picture
EXPECTED = "MP4, MOV, WebM, MKV or AVI"


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What a video is before it is decoded."""

    height: int  # pixels as stored, before a rotation that the file asks for
    width: int
    num_frames: int
    fps: float  # its own frames per second, on the average
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
        refusal = f"{name}: got a file that is no whole video"
        with container_to_keep(file, FORMATS, refusal, EXPECTED) as self._container:
            self.header = self._read_header()

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """What is shown at the times of these frames (ascending; frame i at i / fps, which is not the i-th where the
        rate varies), uint8 [height, width, 3], turned as the file asks for; InvalidRequestError when the file is
        damaged or ends too early.
        """
        fps = self.header.fps
        wanted = iter(indices)
        index = next(wanted, None)
        shown: av.VideoFrame | None = None
        shown_s, num_read = 0.0, 0
        for frame, time_s in self._timed_frames():
            while shown is not None and index is not None and time_s > (index + 0.5) / fps:
                yield _upright(shown)
                index = next(wanted, None)
            if index is None:
                return
            shown, shown_s, num_read = frame, time_s, num_read + 1
        while index is not None:
            if shown is None or index >= shown_s * fps + 1 + MAX_MISSING_FRAMES:
                raise InvalidRequestError(
                    f"{self._name}: got a truncated video, {num_read} of {self.header.num_frames} frames can be read; "
                    "save or copy it again"
                )
            yield _upright(shown)
            index = next(wanted, None)

    def _timed_frames(self) -> Iterator[tuple[av.VideoFrame, float]]:
        """Frames and when they are shown, in seconds after the first one; never backwards."""
        start_s: float | None = None
        last_s = 0.0
        for number, frame in enumerate(self._decoded()):
            self._check_size(frame)
            time_s = number / self.header.fps if frame.time is None else frame.time
            start_s = time_s if start_s is None else start_s
            last_s = max(last_s, time_s - start_s)
            yield frame, last_s

    def sound(self, max_s: float) -> tuple[Samples, int]:
        """The first sound track, mixed into one channel: float32 [1, n] and its rate; no more than max_s of it, and one
        sample more where there is more.
        """
        assert self.header.sound is not None
        rate = self.header.sound.sample_rate
        blocks, num_left = [], int(max_s * rate) + 1
        for block in self._sound_blocks(self.header.sound):
            blocks.append(block[:num_left])
            num_left -= len(blocks[-1])
            if num_left <= 0:
                break
        return np.concatenate([*blocks, np.empty(0, np.float32)])[None], rate

    def _read_header(self) -> VideoHeader:
        if not self._container.streams.video:
            raise InvalidRequestError(f"{self._name}: got a file without pictures, expected a video ({EXPECTED})")
        stream = self._container.streams.video[0]
        if not can_decode(stream):
            raise InvalidRequestError(
                f"{self._name}: got a video of an unknown codec, expected one that FFmpeg decodes"
            )
        if stream.width < 1 or stream.height < 1:
            raise InvalidRequestError(
                f"{self._name}: got a video that does not say its size; save it again, as {EXPECTED}"
            )
        num_frames, length_s = self._measured(stream)
        if num_frames < 1:
            raise InvalidRequestError(f"{self._name}: got a video without frames, expected at least one")
        if not length_s > 0:
            raise InvalidRequestError(
                f"{self._name}: got a video that does not say when its frames are shown; save it again, as {EXPECTED}"
            )
        fps = _frame_rate(stream, num_frames, length_s)
        return VideoHeader(stream.height, stream.width, num_frames, fps, self._sound_header(num_frames / fps))

    def _measured(self, stream: av.VideoStream) -> tuple[int, float]:
        """(frames, seconds) by the times of the packets, since headers are often wrong; nothing is decoded."""
        rate = stream.average_rate or stream.guessed_rate
        frame_s = 1 / float(rate) if rate and rate > 0 else 0.0
        try:
            packets = [(packet.pts, packet.duration or 0) for packet in self._container.demux(stream) if packet.size]
        except av.error.FFmpegError as error:
            raise self._damaged(error) from None
        times = [(pts, pts + duration) for pts, duration in packets if pts is not None]
        if len(times) < 2 or stream.time_base is None:
            return len(packets), len(packets) * frame_s
        shown = sorted(pts for pts, _ in times)
        end = max(stop for _, stop in times)
        if end <= shown[-1]:  # nothing is said of the last one, which is taken to be as long as most
            end = shown[-1] + median_low(later - earlier for earlier, later in pairwise(shown))
        return len(packets), float((end - shown[0]) * stream.time_base)

    def _sound_header(self, video_s: float) -> AudioHeader | None:
        """video_s: the length of the video, which stands in where none is said of the sound."""
        if not self._container.streams.audio:
            return None
        stream = self._container.streams.audio[0]
        if not can_decode(stream):
            raise InvalidRequestError(
                f"{self._name}: got a video with sound of an unknown codec, expected one that FFmpeg decodes"
            )
        check_channels(stream.channels, 1, f"{self._name}'s sound")
        length_s = video_s
        if stream.duration is not None and stream.time_base is not None:
            length_s = float(stream.duration * stream.time_base)
        elif self._container.duration is not None:
            length_s = self._container.duration / av.time_base
        return AudioHeader(stream.rate, stream.channels, max(0, round(length_s * stream.rate)))

    def _decoded(self) -> Iterator[av.VideoFrame]:
        # A stream may hold other sizes than its header names; the decoder is to refuse them before it makes room.
        max_pixels = (self.header.height + CODING_MARGIN) * (self.header.width + CODING_MARGIN)
        self._container.streams.video[0].codec_context.options = {"max_pixels": str(max_pixels)}
        try:
            self._container.seek(0)
            yield from self._container.decode(video=0)
        except av.error.FFmpegError as error:
            raise self._damaged(error) from None

    def _sound_blocks(self, header: AudioHeader) -> Iterator[Samples]:
        """[n] each, mixed into one."""
        try:
            self._container.seek(0)
            for block in track_blocks(self._container, header):
                yield mixed(block, 1)[:, 0]
        except (av.error.FFmpegError, ValueError) as error:
            raise self._damaged(error) from None

    def _check_size(self, frame: av.VideoFrame) -> None:
        if (frame.height, frame.width) != (self.header.height, self.header.width):
            raise InvalidRequestError(
                f"{self._name}: got a frame of {frame.width}x{frame.height} pixels in a video of "
                f"{self.header.width}x{self.header.height}, expected one size; save it again"
            )

    def _damaged(self, error: Exception) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self._name}: got a video that is damaged or truncated ({container_reason(error)}); save or copy it again"
        )

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()


def _frame_rate(stream: av.VideoStream, num_frames: int, length_s: float) -> float:
    """The rate that is said, where it agrees with the times of the frames (a browser's recording says 1000), else that
    of these times.
    """
    rate = stream.average_rate
    if rate and rate > 0 and abs(num_frames / float(rate) - length_s) <= MAX_RATE_ERROR / float(rate):
        return float(rate)
    return num_frames / length_s


def _upright(frame: av.VideoFrame) -> Frame:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
