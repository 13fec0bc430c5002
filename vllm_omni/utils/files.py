"""Where models live on disk, JSON side files, and names of files to write. Reads no weights."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, OmniError
from vllm_omni.utils.checkpoint_files import MAX_JSON_BYTES, check_folder, read_bytes
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.hub import fetch

FetchedFolder = tuple[str, str | None, str | None, Path]  # repository, revision, variant, its folder
ASSET_SCHEME = "asset://"
MAX_LAYERS = 10_000
_NUM_LAYERS = re.compile(r"(layers?|depths?|blocks?|repeats)$")
MAX_DIGITS = 20  # of an integer; no size, count or token id has more


def assets_folder() -> Path:
    """The models that ship with the package."""
    return Path(str(files("vllm_omni"))) / "assets"


class ModelFolders:
    """Resolves what configs call a model to local folders, each hub repository once.

    headers_only: of a repository that is not here yet, nothing is fetched of the weights but their headers. fetched:
    what another one has, as its `fetched` says.
    """

    def __init__(self, *, headers_only: bool = False, fetched: Sequence[FetchedFolder] = ()) -> None:
        self._headers_only = headers_only
        self._hub_roots: dict[tuple[str, str | None, str | None], Path] = {
            (repository, revision, variant): root for repository, revision, variant, root in fetched
        }
        self._checked: set[Path] = set()

    def resolve(self, model: str, revision: str | None = None, variant: str | None = None) -> Path:
        """A folder, `asset://name[/sub]` of the package, or a hub id `owner/name[/sub]` -> a local folder that exists;
        ConfigError where there is none, CheckpointError for a folder with a file that is none, or that leaves it.
        revision, variant: of a hub repository, and of its weights.
        """
        if model.startswith(ASSET_SCHEME):
            return _asset_folder(model)
        folder = _local_folder(model)
        if folder is None:
            folder = self._hub_folder(model, revision, variant)
        elif revision is not None and not self._is_of_hub(folder):
            raise ConfigError(f"revision: got {revision!r}, but {model} is a local folder; leave it out")
        if folder not in self._checked:
            check_folder(folder)
            self._checked.add(folder)
        return folder

    @property
    def fetched(self) -> list[FetchedFolder]:
        """The repositories that were looked up so far."""
        return [(*key, root) for key, root in self._hub_roots.items()]

    def _is_of_hub(self, folder: Path) -> bool:
        """Whether a folder was fetched, by us or into the hub's own cache."""
        is_ours = any(folder.is_relative_to(root) for root in self._hub_roots.values())
        return is_ours or "snapshots" in folder.resolve().parts

    def _hub_folder(self, model: str, revision: str | None, variant: str | None) -> Path:
        parts = model.split("/")
        if len(parts) < 2 or model.startswith(("/", ".", "~")):
            raise ConfigError(
                f"model: got {brief(model)}, expected a folder that exists, a hub id 'owner/name' or 'asset://name'"
            )
        repository = "/".join(parts[:2])
        key = (repository, revision, variant)
        if key not in self._hub_roots:
            self._hub_roots[key] = fetch(repository, revision, variant, headers_only=self._headers_only)
        folder = self._hub_roots[key].joinpath(*parts[2:])
        if ".." in parts or not folder.is_dir():
            raise ConfigError(f"model: got {brief(model)}, but {repository} has no folder {'/'.join(parts[2:])!r}")
        return folder


def resolve_model_folder(model: str, revision: str | None = None) -> Path:
    """One model's folder; see `ModelFolders.resolve`."""
    return ModelFolders().resolve(model, revision)


def _local_folder(model: str) -> Path | None:
    """Absolute, so that a later change of the working directory changes nothing; None where there is no such folder,
    or no folder could have such a name.
    """
    try:
        folder = user_path("model", model, raises=ConfigError).absolute()
    except ConfigError:
        return None
    return folder if model and folder.is_dir() else None


def _asset_folder(model: str) -> Path:
    folder = user_path("model", assets_folder() / model.removeprefix(ASSET_SCHEME), raises=ConfigError)
    shipped = [path.name for path in assets_folder().glob("*") if path.is_dir()]
    if not folder.resolve().is_relative_to(assets_folder().resolve()) or not folder.is_dir():
        raise ConfigError(f"model: got {model!r}, which does not ship{did_you_mean(folder.name, shipped)}")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of bounded size; CheckpointError when it is missing, damaged or something
    else.
    """
    try:
        content = json.loads(read_bytes(path, MAX_JSON_BYTES).decode("utf-8"), parse_int=_bounded_int)
    except RecursionError:
        raise CheckpointError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    _check_depths(content, str(path))
    return content


def _check_depths(content: object, where: str) -> None:
    """No model has that many layers, and a library that believes it fills the memory with lists of their kinds."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if isinstance(value, (dict, list)):
            _check_depths(value, f"{where}: {key}")
        elif isinstance(value, (int, float)) and value > MAX_LAYERS and _NUM_LAYERS.search(str(key)):
            raise CheckpointError(f"{where}: {key}: got {value}, expected at most {MAX_LAYERS}")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def user_path(where: str, name: str | Path, *, raises: type[OmniError]) -> Path:
    """A path as people write it, `~` being their home; `raises` for one that no file could have."""
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name; no such user; a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise raises(f"{where}: got {brief(str(name))}, which cannot be opened ({reason})") from error
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is whole or as it was before: into another one beside it, which takes its place at the end.
    OSError when it cannot be written.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():  # a device or a pipe, which nothing can take the place of
        path.write_bytes(content)
        return
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_suffix(path: Path, known: Collection[str]) -> None:
    """Raises InvalidRequestError for a file to be written whose name says another format."""
    if path.suffix.lower() not in known:
        raise InvalidRequestError(f"path: got {str(path)!r}, expected a name that ends in {' or '.join(known)}")
