"""Model repositories of the Hugging Face hub as local folders: what a model needs, its weights in one variant, nothing
twice. Knows no format but the header of safetensors.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.variants import USUAL_VARIANTS

SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "spk_dict.pt")
WEIGHTS = "*.safetensors"
VARIANTS = "*.*.safetensors"  # model.fp16.safetensors, beside model.safetensors


def fetch(
    repository: str, revision: str | None = None, variant: str | None = None, *, headers_only: bool = False
) -> Path:
    """The repository `owner/name` as a folder, fetched where it is not here yet; ConfigError where that cannot be.

    Of a pipeline the weights of its parts alone, not the single-file checkpoints beside its index; the variant that is
    asked for, else the plain weights, else the only ones there are.

    headers_only: the weights are then files of the right names and sizes that hold their headers and, behind them,
    nothing: shapes can be read of them, and the disk holds none of it. The folder ends with the process.
    """
    try:
        return (_with_headers if headers_only else _whole)(repository, revision, variant)
    except Exception as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        raise ConfigError(
            f"model: {repository!r} is no local folder and could not be fetched from the hub{at}: {error}"
        ) from error


def _download(repository: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored) or None
    )
    return Path(found)


def _whole(repository: str, revision: str | None, variant: str | None) -> Path:
    folder = _download(repository, revision, SIDE_FILES)
    if not (folder / "model_index.json").is_file():
        return folder if any(folder.rglob(WEIGHTS)) else _download(repository, revision, [*SIDE_FILES, WEIGHTS])
    for wanted in _variants(variant):
        missing = [part for part in _models(folder) if not any((folder / part).glob(WEIGHTS))]
        if not missing:
            break
        if wanted is None:
            _download(repository, revision, [f"{part}/{WEIGHTS}" for part in missing], [VARIANTS])
        else:
            patterns = [f"{part}/*.{wanted}{rest}" for part in missing for rest in (".safetensors", "-*.safetensors")]
            _download(repository, revision, patterns)
    return folder


def _with_headers(repository: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import HfApi

    snapshot = _download(repository, revision, SIDE_FILES)
    api = HfApi()
    files = [name for name in api.list_repo_files(repository, revision=revision) if Path(name).match(WEIGHTS)]
    if (snapshot / "model_index.json").is_file():
        files = [name for part in _models(snapshot) for name in _weights_of(part, files, variant)]
    if all((snapshot / name).is_file() for name in files):
        return snapshot
    folder = Path(tempfile.mkdtemp(prefix="vllm-omni-headers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(snapshot, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS))
    for name in files:
        _write_header(folder / name, api.parse_safetensors_file_metadata(repository, name, revision=revision))
    return folder


def _weights_of(part: str, files: Sequence[str], variant: str | None) -> list[str]:
    """The files of one part's weights, in the first variant there is."""
    own = [name for name in files if str(Path(name).parent) == part]
    for wanted in _variants(variant):
        ends = "" if wanted is None else f".{wanted}"
        found = [name for name in own if (f"{ends}." in name if ends else not Path(name).match(VARIANTS))]
        if found:
            return found
    return own


def _variants(variant: str | None) -> Sequence[str | None]:
    return (*([variant] if variant is not None else []), None, *USUAL_VARIANTS)


def _models(folder: Path) -> list[str]:
    """The models among a pipeline's parts (schedulers and tokenizers have no config.json)."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")]
    return [part for part in parts if (folder / part / "config.json").is_file()]


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
