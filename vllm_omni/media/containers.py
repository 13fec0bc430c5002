"""Files that FFmpeg reads, through the file object alone and as one of the formats that are named: playlists and other
formats that name further files or addresses are no media here. Knows no request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import av
import av.error
from av.container import InputContainer

from vllm_omni.errors import InvalidRequestError

# wrong bytes in a file's tags do not keep it from being read: PyAV 19 replaces them by itself
READ_ANY_TAGS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}


def open_container(file: BinaryIO, formats: str) -> InputContainer:
    """formats: FFmpeg's names, as "mp4,webm". Raises FFmpegError or ValueError for a file that is none of them."""
    options = {"format_whitelist": formats, "protocol_whitelist": "none"}
    return av.open(file, "r", options=options, **READ_ANY_TAGS)


@contextmanager
def container_to_keep(file: BinaryIO, formats: str, refusal: str, expected: str) -> Iterator[InputContainer]:
    """For a reader that keeps it: open after the block too, unless the block fails. InvalidRequestError, which begins
    with the refusal ("clip: got a file that is no video"), for a file of none of the formats.
    """
    try:
        container = open_container(file, formats)
    except (av.error.FFmpegError, ValueError) as error:
        raise InvalidRequestError(f"{refusal} ({container_reason(error)}), expected {expected}") from None
    try:
        yield container
    except BaseException:
        container.close()
        raise


def can_decode(stream: av.VideoStream | av.AudioStream) -> bool:
    """A stream of a codec that FFmpeg does not know has no context, though the types promise one."""
    context: object = stream.codec_context
    return context is not None


def container_reason(error: Exception) -> str:
    """FFmpeg's own words; the exception's text would add what it calls the file."""
    return str(error.strerror) if isinstance(error, av.error.FFmpegError) else "it cannot be opened"
