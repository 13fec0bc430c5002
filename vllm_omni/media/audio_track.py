"""A sound on its way into a container that FFmpeg writes: brought to what the codec takes, encoded block by block.
Knows no file and no format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
import soxr
from av.container import OutputContainer

from vllm_omni.media.audio_files import BLOCK_FRAMES, Samples

LAYOUTS = {1: "mono", 2: "stereo"}


@dataclass(frozen=True, slots=True)
class SampleFormat:
    """How samples are handed to a codec."""

    name: str  # FFmpeg's
    bits: int | None = None  # of a sample as integer; None: floats are encoded


FLOATS = SampleFormat("fltp")


class AudioTrack:
    """One sound track of a container that is open for writing; the container stays the caller's.

    channels: 1 or 2. A codec that knows certain rates only gets the next higher one.
    """

    def __init__(
        self,
        container: OutputContainer,
        codec: str,
        sample_rate: int,
        channels: int,
        samples: SampleFormat = FLOATS,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._container, self._samples, self._channels = container, samples, channels
        self._rate = _encoder_rate(codec, sample_rate)
        self._resampler = None
        if self._rate != sample_rate:
            self._resampler = soxr.ResampleStream(sample_rate, self._rate, channels, dtype="float32", quality="HQ")
        stream = container.add_stream(codec, rate=self._rate, layout=LAYOUTS[channels], options=dict(options or {}))
        self._stream = cast(av.AudioStream, stream)
        self._stream.format = samples.name
        self._num_written = 0

    def write(self, samples: Samples) -> None:
        """samples: float32 [channels, n]; those beyond -1 ... 1 are cut there."""
        for start in range(0, samples.shape[1], BLOCK_FRAMES):
            self._encode(self._resampled(samples[:, start : start + BLOCK_FRAMES]))

    def close(self) -> None:
        """Writes what is left."""
        if self._resampler is not None:
            self._encode(self._resampled(np.empty((self._channels, 0), np.float32), is_last=True))
        self._container.mux(self._stream.encode(None))

    def _resampled(self, samples: Samples, is_last: bool = False) -> Samples:
        if self._resampler is None:
            return samples
        made: Samples = self._resampler.resample_chunk(np.ascontiguousarray(samples.T), last=is_last).T
        return made

    def _encode(self, samples: Samples) -> None:
        if not samples.shape[1]:
            return
        frame = self._frame(samples)
        frame.sample_rate, frame.pts = self._rate, self._num_written
        self._num_written += samples.shape[1]
        self._container.mux(self._stream.encode(frame))

    def _frame(self, samples: Samples) -> av.AudioFrame:
        layout, bits = LAYOUTS[self._channels], self._samples.bits
        if bits is None:
            cut = np.ascontiguousarray(np.clip(samples, -1, 1))
            return av.AudioFrame.from_ndarray(cut, format="fltp", layout=layout)
        kind = np.int16 if bits == 16 else np.int32
        packed = np.ascontiguousarray(left_aligned(samples, bits, kind).T.reshape(1, -1))
        return av.AudioFrame.from_ndarray(packed, format=self._samples.name, layout=layout)


def as_integers(samples: Samples, bits: int) -> npt.NDArray[np.int32]:
    """Rounded; full scale is 2**(bits - 1), and what is beyond is cut there."""
    scale = 2.0 ** (bits - 1)
    return np.clip(np.rint(samples.astype(np.float64) * scale), -scale, scale - 1).astype(np.int32)


def left_aligned(samples: Samples, bits: int, kind: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    """Integers of so many bits at the top of a wider kind, as FFmpeg and libsndfile take them."""
    return (as_integers(samples, bits) << (np.iinfo(kind).bits - bits)).astype(kind)


def _encoder_rate(codec: str, sample_rate: int) -> int:
    """The rate at which a codec encodes: the sound's own, else the next higher one that it has."""
    rates = av.Codec(codec, "w").audio_rates
    if not rates or sample_rate in rates:
        return sample_rate
    return min((rate for rate in rates if rate > sample_rate), default=max(rates))
