"""Where models and stage configs live on disk, JSON side files, and names of files to write. Reads no weights."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.utils.checks import did_you_mean
from vllm_omni.utils.hub import download

ASSET_SCHEME = "asset://"


def assets_folder() -> Path:
    """The models that ship with the package."""
    return Path(str(files("vllm_omni"))) / "assets"


class ModelFolders:
    """Resolves what configs call a model to local folders, each hub repository once."""

    def __init__(self) -> None:
        self._hub_roots: dict[tuple[str, str | None, str | None], Path] = {}

    def resolve(self, model: str, revision: str | None = None, variant: str | None = None) -> Path:
        """A folder, `asset://name[/sub]` of the package, or a hub id `owner/name[/sub]` -> a local folder that exists;
        ConfigError where there is none. revision, variant: of a hub repository, and of its weights.
        """
        if model.startswith(ASSET_SCHEME):
            return _asset_folder(model)
        folder = Path(model).expanduser()
        if folder.is_dir():
            if revision is not None and "snapshots" not in folder.resolve().parts:  # of the hub's own cache
                raise ConfigError(f"revision: got {revision!r}, but {model} is a local folder; leave it out")
            return folder
        return self._hub_folder(model, revision, variant)

    def _hub_folder(self, model: str, revision: str | None, variant: str | None) -> Path:
        parts = model.split("/")
        if len(parts) < 2 or model.startswith(("/", ".", "~")):
            raise ConfigError(
                f"model: got {model!r}, expected a folder that exists, a hub id 'owner/name' or 'asset://name'"
            )
        repository = "/".join(parts[:2])
        key = (repository, revision, variant)
        if key not in self._hub_roots:
            self._hub_roots[key] = download(repository, revision, variant)
        folder = self._hub_roots[key].joinpath(*parts[2:])
        if not folder.is_dir():
            raise ConfigError(f"model: got {model!r}, but {repository} has no folder {'/'.join(parts[2:])!r}")
        return folder


def resolve_model_folder(model: str, revision: str | None = None) -> Path:
    """One model's folder; see `ModelFolders.resolve`."""
    return ModelFolders().resolve(model, revision)


def _asset_folder(model: str) -> Path:
    folder = assets_folder() / model.removeprefix(ASSET_SCHEME)
    shipped = [path.name for path in assets_folder().glob("*") if path.is_dir()]
    if not folder.resolve().is_relative_to(assets_folder().resolve()) or not folder.is_dir():
        raise ConfigError(f"model: got {model!r}, which does not ship{did_you_mean(folder.name, shipped)}")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; expected a checkpoint folder in transformers or diffusers format"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


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
