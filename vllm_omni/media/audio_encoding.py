"""Sounds as the bytes of a file, whole or piece by piece while they are made, with what they say of how they were made.
Knows no request and no path.

libsndfile writes WAV, FLAC and Ogg Vorbis; FFmpeg the other formats, and all streams.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import av
import av.error
import numpy as np
import soundfile

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, Audio
from vllm_omni.media.audio_files import BLOCK_FRAMES, Samples, sound_file_reason
from vllm_omni.media.audio_track import FLOATS, LAYOUTS, AudioTrack, SampleFormat, as_integers, left_aligned
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.utils.checks import brief, check_number, did_you_mean

MAX_VORBIS_RATE = 200_000  # libvorbis has no mode beyond, and crashes instead of saying so


@dataclass(frozen=True, slots=True)
class _Format:
    """How one format is written."""

    suffix: str
    samples: SampleFormat = FLOATS  # as they are encoded
    sndfile: tuple[str, str] | None = None  # libsndfile's format and subtype; None: FFmpeg writes whole files too
    container: str | None = None  # FFmpeg's; None: nothing but samples, or written by libsndfile alone
    codec: str = ""
    container_options: Mapping[str, str] = field(default_factory=dict)
    codec_options: Mapping[str, str] = field(default_factory=dict)


# 16 bit PCM plays everywhere, 24 bit FLAC keeps what is soft. AAC stands in ADTS frames, which take an ID3 tag.
AUDIO_FORMATS = {
    "wav": _Format(".wav", SampleFormat("s16", 16), ("WAV", "PCM_16"), "wav", "pcm_s16le"),
    "flac": _Format(
        ".flac",
        SampleFormat("s32", 24),
        ("FLAC", "PCM_24"),
        "flac",
        "flac",
        codec_options={"bits_per_raw_sample": "24"},
    ),
    "ogg": _Format(".ogg", FLOATS, ("OGG", "VORBIS")),
    "opus": _Format(
        ".opus",
        container="ogg",
        codec="libopus",
        samples=SampleFormat("flt"),
        container_options={"page_duration": "100000"},  # microseconds: a listener need not wait for a whole second
    ),
    "mp3": _Format(".mp3", container="mp3", codec="libmp3lame", container_options={"id3v2_version": "4"}),
    "aac": _Format(".aac", container="adts", codec="aac", container_options={"write_id3v2": "1"}),
    "pcm": _Format(".pcm", SampleFormat("s16", 16)),
}
AUDIO_SUFFIXES = {form.suffix: name for name, form in AUDIO_FORMATS.items()}
STREAM_FORMATS = tuple(name for name, form in AUDIO_FORMATS.items() if form.container or not form.sndfile)


def encode_audio(audio: Audio, format: str, *, metadata: MediaMetadata | None = None) -> bytes:
    """The bytes of a file; samples beyond -1 ... 1 are cut there.

    format: a key of AUDIO_FORMATS: wav (16 bit), flac (24 bit), ogg (Vorbis), opus (in Ogg), mp3, aac (ADTS), pcm (16
    bit little-endian, channels interleaved, no header). mp3, opus and aac know certain rates only: other sounds are
    converted to the next higher one. metadata: goes to the comment (RIFF INFO, Vorbis comments, ID3); pcm has none.
    InvalidRequestError for an unknown format, and rates and numbers of channels that it does not hold.
    """
    form = _format(format, AUDIO_FORMATS)
    if form.sndfile is not None:
        return _encode_by_sndfile(audio, format, form, metadata)
    if form.container is None:
        return _packed(audio.samples)
    encoder = _Encoder(format, audio.sample_rate, audio.num_channels, metadata, io.BytesIO())
    encoder.write(audio.samples)
    return encoder.close()


class AudioStream:
    """A sound as the bytes of a file while it is made: what `write` and `close` return, put together, is that file.

    format: a key of STREAM_FORMATS. The header of a file of unknown length goes ahead: wav and flac say no length, mp3
    does not say how many samples of silence its encoder has put before the sound. The samples of wav, flac and pcm are
    those of `encode_audio`. One or two channels; InvalidRequestError for more and for rates out of range.
    """

    def __init__(
        self,
        format: str,
        sample_rate: int,
        channels: int,
        *,
        metadata: MediaMetadata | None = None,
    ) -> None:
        form = _format(format, STREAM_FORMATS)
        check_number(
            "sample_rate", sample_rate, MIN_SAMPLE_RATE, MAX_SAMPLE_RATE, integer=True, raises=InvalidRequestError
        )
        self._channels = channels
        self._is_closed = False
        self._encoder = _Encoder(format, sample_rate, channels, metadata, _Pipe()) if form.container else None

    def write(self, samples: Samples) -> bytes:
        """samples: float32 [channels, n]. Returns what can be sent by now, which may be nothing."""
        if self._is_closed:
            raise InvalidRequestError("samples: got some after the end of the stream; make a new AudioStream")
        if samples.ndim != 2 or len(samples) != self._channels or samples.dtype != np.float32:
            raise InvalidRequestError(
                f"samples: got {samples.dtype} {list(samples.shape)}, expected float32 [{self._channels}, n]"
            )
        if self._encoder is None:
            return _packed(samples)
        return self._encoder.write(samples)

    def close(self) -> bytes:
        """What is left; may be called twice."""
        if self._is_closed or self._encoder is None:
            self._is_closed = True
            return b""
        self._is_closed = True
        return self._encoder.close()


def _packed(samples: Samples) -> bytes:
    """Format pcm."""
    return as_integers(samples, 16).astype("<i2").T.tobytes()


class _Pipe:
    """Takes bytes in and gives them out; cannot seek, so that nothing which was sent changes later."""

    def __init__(self) -> None:
        self._content = bytearray()

    def write(self, content: bytes) -> int:
        self._content += content
        return len(content)

    def take(self) -> bytes:
        taken = bytes(self._content)
        self._content.clear()
        return taken


class _Encoder:
    """FFmpeg at work on one file. sink: a pipe, of which every call takes what is there, or a file, which is whole at
    the end.
    """

    def __init__(
        self, name: str, sample_rate: int, channels: int, metadata: MediaMetadata | None, sink: _Pipe | io.BytesIO
    ) -> None:
        form = AUDIO_FORMATS[name]
        if channels not in LAYOUTS:
            raise InvalidRequestError(f"{name}: got {channels} channels, expected 1 or 2; write a whole wav or flac")
        self._sink = sink
        options = {**form.container_options, "flush_packets": "1"}
        self._container = av.open(cast(BinaryIO, sink), "w", format=form.container, options=options)
        if metadata is not None:
            self._container.metadata["comment"] = metadata.to_text()
        self._track = AudioTrack(self._container, form.codec, sample_rate, channels, form.samples, form.codec_options)
        self._container.start_encoding()

    def write(self, samples: Samples) -> bytes:
        self._track.write(samples)
        return self._take()

    def close(self) -> bytes:
        self._track.close()
        self._container.close()
        return self._sink.getvalue() if isinstance(self._sink, io.BytesIO) else self._sink.take()

    def _take(self) -> bytes:
        return b"" if isinstance(self._sink, io.BytesIO) else self._sink.take()


def _format(name: str, known: Mapping[str, object] | tuple[str, ...]) -> _Format:
    if name not in known:
        raise InvalidRequestError(f"format: got {brief(name)}{did_you_mean(str(name)[:80], known)}")
    return AUDIO_FORMATS[name]


def _encode_by_sndfile(audio: Audio, name: str, form: _Format, metadata: MediaMetadata | None) -> bytes:
    assert form.sndfile is not None
    (container, subtype), rate = form.sndfile, audio.sample_rate
    if subtype == "VORBIS" and rate > MAX_VORBIS_RATE:
        raise InvalidRequestError(
            f"{name}: got {rate} Hz, expected at most {MAX_VORBIS_RATE} Hz; choose another format"
        )
    samples = audio.samples
    if not samples.size and container != "WAV":  # without a sample libsndfile writes no header, and nobody reads that
        samples = np.zeros((audio.num_channels, 1), np.float32)
    file = io.BytesIO()
    try:
        with soundfile.SoundFile(file, "w", rate, audio.num_channels, subtype, format=container) as sound:
            if metadata is not None:
                sound.comment = metadata.to_text()
            for start in range(0, samples.shape[1], BLOCK_FRAMES):
                block = samples[:, start : start + BLOCK_FRAMES].T
                sound.write(
                    np.clip(block, -1, 1)
                    if form.samples.bits is None
                    else left_aligned(block, form.samples.bits, np.int32)
                )
    except soundfile.LibsndfileError as error:
        raise InvalidRequestError(
            f"{name}: {audio.num_channels} channels at {rate} Hz cannot be written as {container} "
            f"({sound_file_reason(error)}); choose another format"
        ) from None
    return file.getvalue()
