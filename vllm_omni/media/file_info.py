"""What a file with a picture, a sound or a video says of itself: what it holds, and how it was made. Decodes nothing;
knows no request.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import av.error
from av.stream import Disposition
from PIL import Image

from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_containers import FORMATS
from vllm_omni.media.containers import open_container
from vllm_omni.media.image_encoding import EXIF_IFD, UNICODE, USER_COMMENT
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.media.source_files import open_source_file

IMAGE_READERS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")
ANIMATIONS = ("GIF", "WEBP")
TEXT_FIELDS = ("parameters", "comment", "description")  # where programs write it, the first that there is
ASCII = b"ASCII\0\0\0"


@dataclass(frozen=True, slots=True)
class FileInfo:
    """content: such as "PNG image, 512x512". metadata: None where the file says nothing of how it was made."""

    content: str
    metadata: MediaMetadata | None


def read_file_info(path: Path) -> FileInfo:
    """InvalidRequestError for what cannot be opened, and what is no picture, no sound and no video."""
    with open_source_file(path, "file", "a picture, a sound or a video") as file:
        info = _image_info(file)
        if info is None:
            file.seek(0)
            info = _container_info(file)
    if info is None:
        raise InvalidRequestError(
            f"file: got {str(path)!r}, which is no picture, no sound and no video that can be read"
        )
    return info


def _image_info(file: BinaryIO) -> FileInfo | None:
    try:
        with Image.open(file, formats=IMAGE_READERS) as image:
            texts = {key: _as_text(value) for key, value in image.info.items() if isinstance(value, str | bytes)}
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
            text = next((texts[name] for name in TEXT_FIELDS if name in texts), None)
            text = _user_comment(comment) if text is None else text
            content = f"{image.format} image, {image.width}x{image.height}"
            if image.format in ANIMATIONS and image.n_frames > 1:  # type: ignore[attr-defined]
                content += f", {image.n_frames} frames"  # type: ignore[attr-defined]
    except Exception:  # the library raises whatever its parsers raise
        return None
    return FileInfo(content, None if not text else MediaMetadata.parse(text))


def _user_comment(comment: object) -> str | None:
    """Exif 2.32, 4.6.5: eight bytes that name the encoding, then the text."""
    if isinstance(comment, str):
        return comment
    if not isinstance(comment, bytes):
        return None
    if comment.startswith(UNICODE):
        return comment[len(UNICODE) :].decode("utf-16-be", "replace")
    return comment.removeprefix(ASCII).decode("utf-8", "replace").strip("\0")


def _container_info(file: BinaryIO) -> FileInfo | None:
    try:
        with open_container(file, FORMATS) as container:
            films = [each for each in container.streams.video if not _is_cover(each)]
            stream = films[0] if films else container.streams.audio[0]
            tags = {key.lower(): value for each in (stream, container) for key, value in each.metadata.items()}
            said = "" if container.duration is None else f"{container.duration / av.time_base:.2f} s, "
            content = _film_words(films[0], said) if films else _sound_words(container.streams.audio[0], said)
    except (av.error.FFmpegError, ValueError, IndexError, AttributeError):
        return None
    text = next((tags[name] for name in TEXT_FIELDS if name in tags), None)
    return FileInfo(content, None if not text else MediaMetadata.parse(text))


def _is_cover(stream: av.VideoStream) -> bool:
    """A picture within a sound file."""
    return bool(stream.disposition & Disposition.attached_pic)


def _film_words(stream: av.VideoStream, length: str) -> str:
    rate = "" if not stream.average_rate else f", {float(stream.average_rate):g} frames a second"
    return f"{stream.codec_context.name} video, {length}{stream.width}x{stream.height}{rate}"


def _sound_words(stream: av.AudioStream, length: str) -> str:
    return f"{stream.codec_context.name} audio, {length}{stream.rate} Hz, {stream.channels} channels"


def _as_text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
