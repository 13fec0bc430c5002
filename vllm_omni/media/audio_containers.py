"""Sounds in the containers of films and phones (MP4, M4A, AAC, WebM, MKV), read by FFmpeg: how long they are by the
times of their packets, and their samples block by block. Knows no request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import av
import av.error
import numpy as np
from av.container import InputContainer

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_files import AudioHeader, Samples
from vllm_omni.media.containers import can_decode, container_reason, container_to_keep

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,aac,mp3,ogg,flac,wav,asf"
EXPECTED = "WAV, FLAC, OGG, MP3, M4A, AAC, MP4, WebM or another format that libsndfile or FFmpeg reads"
MAX_PADDING_S = 0.5  # what encoders put before and behind a sound, which is not always said


class ContainerAudioReader:
    """The first sound track of a file that is open for reading; a context manager.

    file: binary, seekable, at its beginning; it stays the caller's. name: how messages call it. Opening decodes
    nothing, but looks at every packet; InvalidRequestError for what has no sound.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._name = name
        refusal = f"{name}: got a file that is no sound"
        with container_to_keep(file, FORMATS, refusal, EXPECTED) as self._container:
            self.header = self._read_header()

    def check_whole(self) -> None:
        """Whether a file was cut shows when it is decoded."""

    def blocks(self) -> Iterator[Samples]:
        """All samples, float32 [frames, channels]; InvalidRequestError when the file is damaged, or holds more or less
        than its packets say.
        """
        padding = int(MAX_PADDING_S * self.header.sample_rate)
        num_left = self.header.num_frames + padding
        try:
            self._container.seek(0)
            for block in track_blocks(self._container, self.header):
                num_left -= len(block)
                if num_left < 0:
                    raise InvalidRequestError(
                        f"{self._name}: got a sound longer than the {self.header.duration_s:.2f} s that its file says; "
                        "save it again"
                    )
                yield block
        except (av.error.FFmpegError, ValueError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            raise InvalidRequestError(
                f"{self._name}: got a file that is damaged or truncated ({container_reason(error)}); save or copy it "
                "again"
            ) from None
        if num_left > 2 * padding:
            missing_s = (num_left - padding) / self.header.sample_rate
            raise InvalidRequestError(
                f"{self._name}: got a truncated file, {missing_s:.2f} s of {self.header.duration_s:.2f} s are missing; "
                "save or copy it again"
            )

    def _read_header(self) -> AudioHeader:
        if not self._container.streams.audio:
            raise InvalidRequestError(f"{self._name}: got a file without sound, expected {EXPECTED}")
        stream = self._container.streams.audio[0]
        if not can_decode(stream):
            raise InvalidRequestError(
                f"{self._name}: got a sound of an unknown codec, expected one that FFmpeg decodes"
            )
        if not stream.rate or not stream.channels:
            raise InvalidRequestError(
                f"{self._name}: got a file that is no sound (no rate or channels), expected {EXPECTED}"
            )
        try:
            length_s = track_length_s(self._container, stream)
        except av.error.FFmpegError as error:
            raise InvalidRequestError(
                f"{self._name}: got a file that is damaged or truncated ({container_reason(error)}); save or copy it "
                "again"
            ) from None
        return AudioHeader(stream.rate, stream.channels, round(length_s * stream.rate))

    def __enter__(self) -> ContainerAudioReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()


def track_length_s(container: InputContainer, stream: av.AudioStream | av.VideoStream) -> float:
    """From the first packet to the end of the last one. Leaves the container at its end."""
    start = end = None
    for packet in container.demux(stream):
        if packet.pts is not None and packet.size:
            start = packet.pts if start is None else min(start, packet.pts)
            stop = packet.pts + max(packet.duration or 0, 0)
            end = stop if end is None else max(end, stop)
    if start is None or end is None or stream.time_base is None:
        return 0.0
    return float((end - start) * stream.time_base)


def track_blocks(container: InputContainer, header: AudioHeader) -> Iterator[Samples]:
    """The first sound track from where the container is, float32 [frames, channels] at the header's rate; FFmpegError
    for what is damaged, ValueError for a track that changes on its way.
    """
    as_floats = av.AudioResampler(format="flt", rate=header.sample_rate)
    for frame in container.decode(audio=0):
        if frame.layout.nb_channels != header.num_channels:
            raise ValueError("the number of channels changes")
        for part in as_floats.resample(frame):
            yield np.ascontiguousarray(part.to_ndarray().reshape(-1, header.num_channels), np.float32)
