"""Samples as OpenAI's realtime clients send and play them: 16 bit, little-endian, mono, 24 kHz."""

from __future__ import annotations

import numpy as np
import soxr

from vllm_omni.entrypoints.server.answers.encoding import NewSamples
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.media.audio import Audio
from vllm_omni.media.audio_encoding import AudioStream
from vllm_omni.media.audio_files import Samples
from vllm_omni.media.time_stretch import TimeStretch

SAMPLE_RATE = 24_000
SAMPLE_BYTES = 2


def decoded(content: bytes, field: str) -> Audio:
    """ApiError 400 for half a sample, or none."""
    if not content or len(content) % SAMPLE_BYTES:
        raise ApiError(
            400,
            f"{field}: got {len(content)} bytes, expected 16 bit samples",
            code="invalid_value",
            param=field,
        )
    return Audio((np.frombuffer(content, "<i2").astype(np.float32) / np.float32(2**15))[None], SAMPLE_RATE)


def duration_ms(num_bytes: int) -> int:
    return num_bytes * 1000 // (SAMPLE_BYTES * SAMPLE_RATE)


class PcmPieces:
    """Sound as it comes, at any rate and with one or two channels, as such samples; see NewSamples."""

    def __init__(self, speed: float = 1.0) -> None:
        self._speed = speed
        self._new = NewSamples()
        self._stretch: TimeStretch | None = None
        self._resampler: soxr.ResampleStream | None = None
        self._packer = AudioStream("pcm", SAMPLE_RATE, 1)
        self._has_begun = False

    def add(self, audio: Audio) -> bytes:
        if not self._has_begun:
            self._begin(audio.sample_rate)
        new = self._new.of(audio).mean(axis=0, keepdims=True, dtype=np.float32)
        if not new.shape[1]:
            return b""
        return self._packed(new if self._stretch is None else self._stretch.write(new), is_last=False)

    def close(self) -> bytes:
        rest = np.empty((1, 0), np.float32) if self._stretch is None else self._stretch.close()
        return self._packed(rest, is_last=True) + self._packer.close()

    def _begin(self, sample_rate: int) -> None:
        self._has_begun = True
        if self._speed != 1:
            self._stretch = TimeStretch(self._speed, sample_rate, 1)
        if sample_rate != SAMPLE_RATE:
            self._resampler = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")

    def _packed(self, samples: Samples, is_last: bool) -> bytes:
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(np.ascontiguousarray(samples.T), last=is_last).T
        return self._packer.write(samples)
