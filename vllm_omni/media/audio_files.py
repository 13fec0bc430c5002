"""Sound files: what their headers say, their samples block by block. Knows no request.

Samples are float32, full scale is -1 to 1. Reading never trusts a header: see `AudioReader`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from vllm_omni.errors import InvalidRequestError

Samples = npt.NDArray[np.float32]

BLOCK_FRAMES = 65_536
UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # what a WAV says that was written into a pipe
MAX_FRAMES = 2**62  # libsndfile's word for an unknown length is more
MAX_WAV_CHUNKS = 1_000  # that are looked at for the samples
MAX_MISSING_S = 0.1  # a compressed file may be that much shorter than it says


class UnreadableSoundError(InvalidRequestError):
    """No sound that libsndfile reads; others may."""


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """What audio is before its samples are read."""

    sample_rate: int  # Hz
    num_channels: int
    num_frames: int  # samples of each channel

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.sample_rate


class AudioReader:
    """A sound file that is open for reading (any container that libsndfile knows); a context manager.

    file: binary, seekable, at its beginning; it stays the caller's. name: how messages call it. Opening reads the
    header alone; InvalidRequestError for what has no sample rate, UnreadableSoundError for what is no sound.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._name = name
        declared = _wav_header(file)
        file.seek(0)
        if declared is not None and declared.sample_rate == 0:
            raise InvalidRequestError(f"{name}: got a sample rate of 0 Hz; the file's header is damaged, save it again")
        try:
            self._sound = soundfile.SoundFile(file)
        except soundfile.LibsndfileError as error:
            raise UnreadableSoundError(f"{name}: got a file that is no sound ({sound_file_reason(error)})") from None
        if self._sound.frames > MAX_FRAMES:  # a FLAC that was written into a pipe says no length
            self._sound.close()
            raise UnreadableSoundError(f"{name}: got a sound that does not say how long it is")
        found = AudioHeader(self._sound.samplerate, self._sound.channels, self._sound.frames)
        self.header = declared if declared is not None and declared.num_frames > found.num_frames else found
        self._num_present = found.num_frames

    def check_whole(self) -> None:
        """InvalidRequestError when the file is shorter than its header says, as far as that shows without decoding."""
        if self._num_present < self.header.num_frames:
            raise self._truncated(self.header.num_frames - self._num_present)

    def blocks(self) -> Iterator[Samples]:
        """All samples, float32 [frames, channels], at most BLOCK_FRAMES at a time; InvalidRequestError when the file is
        damaged or ends too early.
        """
        self.check_whole()
        num_missing = self.header.num_frames
        while num_missing > 0:
            block = self._read(self.header.num_frames - num_missing)
            if not len(block):
                break
            num_missing -= len(block)
            yield block
        if num_missing > MAX_MISSING_S * self.header.sample_rate:
            raise self._truncated(num_missing)

    def _read(self, num_read: int) -> Samples:
        try:
            block: Samples = self._sound.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise InvalidRequestError(
                f"{self._name}: got a file that is damaged or truncated ({sound_file_reason(error)}) after "
                f"{num_read / self.header.sample_rate:.2f} s; save or copy it again"
            ) from None
        return block

    def _truncated(self, num_missing: int) -> InvalidRequestError:
        missing_s = num_missing / self.header.sample_rate
        return InvalidRequestError(
            f"{self._name}: got a truncated file, {missing_s:.2f} s of {self.header.duration_s:.2f} s are missing; "
            "save or copy it again"
        )

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._sound.close()


def sound_file_reason(error: soundfile.LibsndfileError) -> str:
    """libsndfile's own words; the exception's text would add the file object's address."""
    return str(error.error_string).strip(" .\n")


def _wav_header(file: BinaryIO) -> AudioHeader | None:
    """What the RIFF header of a WAV claims (libsndfile silently cuts it to what is there); None for other files.

    Microsoft, Multimedia Programming Interface and Data Specifications 1.0, 1991, "WAVE".
    """
    riff = file.read(12)
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        return None
    rate = channels = frame_bytes = 0
    for _ in range(MAX_WAV_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return None
        kind, size = struct.unpack("<4sI", head)
        if kind == b"data":
            is_known = frame_bytes and size not in UNKNOWN_SIZES
            return AudioHeader(rate, channels, size // frame_bytes if is_known else 0)
        if kind == b"fmt " and size >= 16:
            content = file.read(16)
            if len(content) < 16:
                return None
            _, channels, rate, _, frame_bytes, bits = struct.unpack("<HHIIHH", content)
            if not bits or frame_bytes * 8 != channels * bits:
                frame_bytes = 0  # compressed: the size says nothing of the length
            size -= 16
        file.seek(size + size % 2, 1)
    return None
