"""Pictures, sounds and videos as the bytes of files, made beside the event loop."""

from __future__ import annotations

import asyncio
import base64

from PIL import Image

from vllm_omni.media.audio import Audio
from vllm_omni.media.audio_encoding import AUDIO_FORMATS, AudioStream, encode_audio
from vllm_omni.media.audio_files import Samples
from vllm_omni.media.image_encoding import QUALITIES, encode_image
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.media.time_stretch import TimeStretch
from vllm_omni.media.video import Video
from vllm_omni.media.video_encoding import encode_video

IMAGE_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
AUDIO_TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
}
VIDEO_TYPES = {"mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif", "webp": "image/webp"}


async def image_bytes(
    image: Image.Image, kind: str = "png", quality: int | None = None, metadata: MediaMetadata | None = None
) -> bytes:
    """A file that says how the picture was made."""
    quality = quality if kind in QUALITIES else None
    return await asyncio.to_thread(encode_image, image, kind, quality=quality, metadata=metadata)


async def image_base64(
    image: Image.Image, kind: str = "png", quality: int | None = None, metadata: MediaMetadata | None = None
) -> str:
    return base64.b64encode(await image_bytes(image, kind, quality, metadata)).decode()


async def audio_bytes(audio: Audio, kind: str, metadata: MediaMetadata | None = None) -> bytes:
    """A whole file that says how it was made, where its format can."""
    return await asyncio.to_thread(encode_audio, audio, file_format(kind), metadata=metadata)


async def audio_base64(audio: Audio, kind: str) -> str:
    return base64.b64encode(await audio_bytes(audio, kind)).decode()


async def video_bytes(video: Video, kind: str, metadata: MediaMetadata | None = None) -> bytes:
    """A file that says how the video was made."""
    return await asyncio.to_thread(encode_video, video, kind, metadata=metadata)


def file_format(kind: str) -> str:
    """The name of a format among AUDIO_FORMATS; OpenAI's chat has another one for bare samples."""
    return "pcm" if kind == "pcm16" else kind


def sample_headers(audio: Audio, kind: str) -> dict[str, str]:
    """What a client must know of bare samples. Of formats alone that keep rate and channels."""
    bits = AUDIO_FORMATS[file_format(kind)].samples.bits
    if bits is None:
        return {}
    return {
        "x-sample-rate": str(audio.sample_rate),
        "x-channels": str(audio.num_channels),
        "x-bit-depth": str(bits),
    }


class NewSamples:
    """Partial and whole sounds may be given, one after the other: what was there is known by where they start."""

    def __init__(self) -> None:
        self.num_samples = 0  # that were given so far, each once

    def of(self, audio: Audio) -> Samples:
        new = audio.samples[:, max(0, self.num_samples - audio.start) :]
        self.num_samples += new.shape[1]
        return new


class AudioPieces:
    """Sound as it comes, as the bytes of one file; see NewSamples. speed: how fast it is said, at the same pitch.
    InvalidRequestError where the format cannot hold it.
    """

    def __init__(self, kind: str, speed: float = 1.0) -> None:
        self._format = file_format(kind)
        self._speed = speed
        self._new = NewSamples()
        self._stream: AudioStream | None = None  # made with the first samples, which tell rate and channels
        self._stretch: TimeStretch | None = None

    @property
    def num_samples(self) -> int:
        """Of the sound as it came."""
        return self._new.num_samples

    async def add(self, audio: Audio) -> bytes:
        return await asyncio.to_thread(self._add, audio)

    async def close(self) -> bytes:
        return b"" if self._stream is None else await asyncio.to_thread(self._close, self._stream)

    def _add(self, audio: Audio) -> bytes:
        if self._stream is None:
            rate, channels = audio.sample_rate, audio.num_channels
            if self._speed != 1:
                self._stretch = TimeStretch(self._speed, rate, channels)
            self._stream = AudioStream(self._format, rate, channels)
        new = self._new.of(audio)
        if not new.shape[1]:
            return b""
        return self._stream.write(new if self._stretch is None else self._stretch.write(new))

    def _close(self, stream: AudioStream) -> bytes:
        rest = b"" if self._stretch is None else stream.write(self._stretch.close())
        return rest + stream.close()
