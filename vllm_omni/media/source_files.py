"""Files that a request names or holds as a data URI: opened where they are regular files on this machine. Nothing is
ever fetched.

Knows no format of what is in them.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from vllm_omni.errors import InvalidRequestError, UnreadableMediaError
from vllm_omni.utils.checks import brief

MEGABYTE = 2**20
URL = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
DATA = re.compile(r"\s*data:", re.IGNORECASE)
DATA_URI = re.compile(r"\s*data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,\s]*)*)(;base64)?,", re.IGNORECASE)
MAX_URI_HEAD = 512  # characters before the content


@contextmanager
def caller_media() -> Iterator[None]:
    """Around whatever reads media of a request: what is wrong with them is an UnreadableMediaError, so that it is seen
    to be the caller's also where a stage finds it in the middle of its work.
    """
    try:
        yield
    except UnreadableMediaError:
        raise
    except InvalidRequestError as error:
        raise UnreadableMediaError(str(error)) from error.__cause__


def open_source_file(source: str | os.PathLike[str], name: str, expected: str) -> BinaryIO:
    """A regular file, or the content of a data URI, open for reading; name: how messages call it; expected: such as "a
    sound file".

    InvalidRequestError for an address, a folder, a device and what cannot be opened.
    """
    if isinstance(source, str) and DATA.match(source):
        return io.BytesIO(decode_data_uri(source, name))
    shown = f"{name}: got {brief(os.fspath(source))}"
    if isinstance(source, str) and URL.match(source):
        raise InvalidRequestError(
            f"{shown}, an address, and nothing is fetched; expected a path or bytes: download it first"
        )
    try:
        path = Path(source).expanduser()
        if not path.exists() or path.is_file():
            return path.open("rb")
    except OSError as error:
        raise InvalidRequestError(f"{shown}, which cannot be read ({error.strerror}); expected {expected}") from None
    except (ValueError, RuntimeError):  # a NUL, or a home folder that is none
        raise InvalidRequestError(f"{shown}, which is no name of a file") from None
    raise InvalidRequestError(f"{shown}, a folder or a device, expected {expected}")


def decode_data_uri(source: str, name: str) -> bytes:
    """The content of data:TYPE;base64,CONTENT; InvalidRequestError for what is none."""
    match = DATA_URI.match(source[:MAX_URI_HEAD])
    if match is None:
        raise InvalidRequestError(f"{name}: got a data URI without a comma, expected data:TYPE;base64,CONTENT")
    content = source[match.end() :]
    return decode_base64(content, name) if match.group(3) else unquote_to_bytes(content)


def decode_base64(text: str, name: str) -> bytes:
    """InvalidRequestError for what is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequestError(f"{name}: got text that is no base64; expected the bytes of a file") from None


def num_bytes_of(file: BinaryIO) -> int:
    """Of an open file, or of what a data URI held; it is at its beginning before and after."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    return num_bytes


def check_num_bytes(num_bytes: int, max_mb: float, name: str, key: str) -> None:
    """InvalidRequestError for more than `limits.<key>` megabytes."""
    if num_bytes > max_mb * MEGABYTE:
        raise InvalidRequestError(
            f"{name}: got {num_bytes / MEGABYTE:.1f} MB, expected at most {max_mb:g} (limits.{key})"
        )
