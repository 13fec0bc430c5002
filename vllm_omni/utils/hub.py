"""Model repositories of the Hugging Face hub as local folders. Knows no format but the header of safetensors."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError

SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "spk_dict.pt")
WEIGHTS = "*.safetensors"


def fetch(repository: str, *, headers_only: bool = False) -> Path:
    """The repository `owner/name` as a folder, fetched where it is not here yet; ConfigError where that cannot be.

    headers_only: the weights are then files of the right names and sizes that hold their headers and, behind them,
    nothing: shapes can be read of them, and the disk holds none of it. The folder ends with the process.
    """
    from huggingface_hub import snapshot_download

    try:
        if not headers_only:
            return Path(snapshot_download(repository, allow_patterns=[*SIDE_FILES, WEIGHTS]))
        return _with_headers(repository, Path(snapshot_download(repository, allow_patterns=list(SIDE_FILES))))
    except Exception as error:
        raise ConfigError(
            f"model: {repository!r} is no local folder and could not be fetched from the hub: {error}"
        ) from error


def _with_headers(repository: str, snapshot: Path) -> Path:
    from huggingface_hub import HfApi

    api = HfApi()
    files = [name for name in api.list_repo_files(repository) if Path(name).match(WEIGHTS)]
    missing = [name for name in files if not (snapshot / name).is_file()]
    if not missing:
        return snapshot
    folder = Path(tempfile.mkdtemp(prefix="vllm-omni-headers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(snapshot, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS))
    for name in files:
        _write_header(folder / name, api.parse_safetensors_file_metadata(repository, name))
    return folder


def _write_header(path: Path, metadata: Any) -> None:
    """A safetensors file (8 bytes of length, a JSON header, then the data) whose data are a hole."""
    tensors = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for name, info in metadata.tensors.items()
    }
    header = json.dumps(tensors).encode()
    size = max((info.data_offsets[1] for info in metadata.tensors.values()), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
