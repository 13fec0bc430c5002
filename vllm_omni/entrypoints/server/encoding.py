"""Pictures and sounds as the bytes of files, made beside the event loop."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vllm_omni.media.audio import Audio
from vllm_omni.media.audio_encoding import encode_audio
from vllm_omni.media.image_encoding import QUALITIES, encode_image

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


async def image_bytes(image: Image.Image, kind: str = "png", quality: int | None = None) -> bytes:
    return await asyncio.to_thread(_image_bytes, image, kind, quality)


async def image_base64(image: Image.Image, kind: str = "png", quality: int | None = None) -> str:
    return base64.b64encode(await image_bytes(image, kind, quality)).decode()


async def audio_bytes(audio: Audio, kind: str) -> bytes:
    return await asyncio.to_thread(_audio_bytes, audio, kind)


async def audio_base64(audio: Audio, kind: str) -> str:
    return base64.b64encode(await audio_bytes(audio, kind)).decode()


def joined(pieces: Sequence[Audio]) -> Audio:
    return Audio(np.concatenate([piece.samples for piece in pieces], axis=1), pieces[0].sample_rate)


def _image_bytes(image: Image.Image, kind: str, quality: int | None) -> bytes:
    return encode_image(image, kind, quality=quality if kind in QUALITIES else None)


def _audio_bytes(audio: Audio, kind: str) -> bytes:
    return encode_audio(audio, "pcm" if kind == "pcm16" else kind)


class AudioPieces:
    """Sound as it comes, as the bytes of one file. Partial and whole sounds may be given: what was there is known by
    where they start.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._num_samples = 0

    async def add(self, audio: Audio) -> bytes:
        new = audio.samples[:, max(0, self._num_samples - audio.start) :]
        self._num_samples += new.shape[1]
        return (np.clip(new.T, -1, 1) * 32767).astype("<i2").tobytes()

    async def close(self) -> bytes:
        return b""
