"""What may be read of a checkpoint: regular files of bounded size that lie in their folder. Knows no format.

A hub snapshot consists of links into the `blobs` of its repository; those are the only links that may leave a folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from vllm_omni.errors import CheckpointError, OmniError

MAX_JSON_BYTES = 64 * 2**20
MAX_SIDE_BYTES = 128 * 2**20  # of what a library reads whole, such as tokenizer.json
READ_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".pt")  # what this package, or a library for it, opens
MAX_ENTRIES = 10_000  # that are looked at in a folder; no checkpoint has more
RUST = "pyo3_runtime"  # libraries in Rust panic over files that they did not expect, with a BaseException
FIX = "expected a checkpoint folder in transformers or diffusers format"


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a file; CheckpointError unless it is a regular one, in its folder and not larger."""
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)  # it allocates what it is told
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > max_bytes:
        raise CheckpointError(f"{path}: got more than {max_bytes} bytes, expected a side file of a checkpoint")
    return content


def check_file(path: Path) -> None:
    """CheckpointError unless this is a regular file that lies in its folder; nothing is opened."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {FIX}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read ({reason})") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: got {_kind(mode)}, expected a regular file; {FIX}")
    if path.is_symlink() and not _is_at_home(path):
        raise CheckpointError(f"{path}: a link to {str(path.readlink())!r}, outside of the folder; copy the file there")


def check_folder(folder: Path) -> None:
    """Every file that could be opened here or one folder below (as diffusers lays parts out), by its name."""
    for path in _entries(folder):
        if path.suffix in READ_SUFFIXES:
            _check_present(path)
        elif path.is_dir() and not path.name.startswith("."):
            for inner in _entries(path):
                if inner.suffix in READ_SUFFIXES:
                    _check_present(inner)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns what a library, or a model's own configuration class, raises over a checkpoint's content into a
    CheckpointError. where: the file, and the key as far as that is known.
    """
    try:
        yield
    except OmniError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != RUST:
            raise
        raise CheckpointError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error


def _entries(folder: Path) -> list[Path]:
    try:
        return list(islice(folder.iterdir(), MAX_ENTRIES))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error


def _check_present(path: Path) -> None:
    """A link to nothing is a file that is missing, if somebody asks for it."""
    if os.path.exists(path) and not path.is_dir():  # noqa: PTH110 - which never raises
        check_file(path)
        if path.suffix != ".safetensors" and path.stat().st_size > MAX_SIDE_BYTES:
            raise CheckpointError(f"{path}: got more than {MAX_SIDE_BYTES} bytes, expected a side file of a checkpoint")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def _is_at_home(path: Path) -> bool:
    """Whether a link leads into the folder that it stands in, into the pipeline folder around that, or, in a hub
    snapshot, into the repository's blobs.
    """
    target = path.resolve()
    homes = [path.parent.resolve()]
    if (homes[0].parent / "model_index.json").is_file():
        homes.append(homes[0].parent)
    homes += [parent.parent / "blobs" for parent in homes[0].parents if parent.name == "snapshots"]
    return any(target.is_relative_to(home) for home in homes)
