"""Which file a request means: one that lies in a folder of the stage's `lora.folders`. Reads nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.lora import LoRA
from vllm_omni.utils.checkpoint_files import MAX_ENTRIES, check_file
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.files import ASSET_SCHEME, resolve_model_folder, user_path

SUFFIX = ".safetensors"
MAX_NAME_BYTES = 240  # with the suffix no file system refuses it


@dataclass(frozen=True, slots=True)
class LoRAFile:
    """A file as it is now: another one at its place is another one."""

    path: Path
    num_bytes: int
    modified_ns: int

    @property
    def key(self) -> str:
        return f"{self.path}|{self.num_bytes}|{self.modified_ns}"

    @classmethod
    def of(cls, path: Path) -> LoRAFile:
        """CheckpointError unless it is a regular file that lies in its folder."""
        check_file(path)
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)


class LoRAFolders:
    """The folders that a config allows. Their files are those directly in them; links that lead out are refused."""

    def __init__(self, folders: Sequence[str]) -> None:
        """ConfigError for a folder that is none."""
        self._folders = [_folder(name) for name in folders]

    def find(self, lora: LoRA) -> LoRAFile:
        """InvalidRequestError where there is no such file, or it may not be read."""
        path = self._named(str(lora.name)) if lora.path is None else self._at(lora.path)
        try:
            return LoRAFile.of(path)
        except CheckpointError as error:
            raise InvalidRequestError(f"lora: {error}") from error

    def names(self) -> list[str]:
        """Of all adapters that a request may name."""
        found = {
            path.name.removesuffix(SUFFIX)
            for folder in self._folders
            for path in islice(folder.iterdir(), MAX_ENTRIES)
            if path.suffix == SUFFIX and not path.name.startswith(".")
        }
        return sorted(found)

    def _named(self, name: str) -> Path:
        if not _is_plain(name):
            raise InvalidRequestError(f"lora.name: got {brief(name)}, expected the name of a file, without a folder")
        for folder in self._folders:
            path = folder / f"{name.removesuffix(SUFFIX)}{SUFFIX}"
            if path.exists() or path.is_symlink():
                return path
        raise InvalidRequestError(f"lora.name: got {brief(name)}{did_you_mean(name[:80], self.names())}")

    def _at(self, given: str) -> Path:
        path = user_path("lora.path", given, raises=InvalidRequestError)
        parent = path.parent.resolve()
        if parent not in self._folders or path.suffix != SUFFIX or not _is_plain(path.name):
            raise InvalidRequestError(
                f"lora.path: got {brief(given)}, expected a {SUFFIX} file directly in one of the stage's lora.folders"
            )
        return parent / path.name


def _folder(name: str) -> Path:
    if name.startswith(ASSET_SCHEME):
        return resolve_model_folder(name).resolve()
    folder = user_path("lora.folders", name, raises=ConfigError)
    if not folder.is_dir():
        raise ConfigError(f"lora.folders: got {brief(name)}, expected a folder that exists")
    return folder.resolve()


def _is_plain(name: str) -> bool:
    is_one = not name.startswith(".") and not any(mark in name for mark in "/\\") and name.isprintable()
    return is_one and len(name.encode()) <= MAX_NAME_BYTES
