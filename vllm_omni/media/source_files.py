"""Files that a request names: opened where they are regular files on this machine. Nothing is ever fetched.

Knows no format of what is in them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.checks import brief

MEGABYTE = 2**20
URL = re.compile(r"\s*(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


def open_source_file(source: str | os.PathLike[str], name: str, expected: str) -> BinaryIO:
    """A regular file, open for reading; name: how messages call it; expected: such as "a sound file".

    InvalidRequestError for an address, a folder, a device and what cannot be opened.
    """
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


def check_num_bytes(num_bytes: int, max_mb: float, name: str, key: str) -> None:
    """InvalidRequestError for more than `limits.<key>` megabytes."""
    if num_bytes > max_mb * MEGABYTE:
        raise InvalidRequestError(
            f"{name}: got {num_bytes / MEGABYTE:.1f} MB, expected at most {max_mb:g} (limits.{key})"
        )
