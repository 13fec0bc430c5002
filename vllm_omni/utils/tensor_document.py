"""A file that holds a document: plain JSON values, and tensors among them. It is safetensors, the JSON in its header,
so nothing is ever unpickled. What is read is bounded and checked before anyone sees it; what it means is for others to
say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.checks import brief
from vllm_omni.utils.files import user_path, write_whole
from vllm_omni.utils.plain import as_json

REFERENCE = "$tensor"  # {"$tensor": name} stands for the tensor of that name
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
MAX_FILE_BYTES = 64 * 2**30
MAX_JSON_BYTES = 64 * 2**20
MAX_TENSORS = 100_000
MAX_DEPTH = 32
MAX_VALUES = 2_000_000
MAX_DIGITS = 20  # of an integer; no seed and no count has more


def write_document(path: Path, kind: str, document: Mapping[str, Any]) -> None:
    """Writes a file that is whole or as it was before. kind: what it is, which `read_document` must be told. Raises
    InvalidRequestError for what such a file cannot hold and where it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(document, "", tensors, kind), ensure_ascii=False, allow_nan=False)
    content = save(tensors or {"": torch.zeros(0)}, {kind: text})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_document(name: str | Path, kind: str) -> dict[str, Any]:
    """What `write_document` wrote; tensors are on the CPU, finite, and nobody else's. InvalidRequestError for any other
    file.
    """
    path = user_path("path", name, raises=InvalidRequestError)
    if not path.is_file():
        raise InvalidRequestError(f"{path}: got no file, expected one that holds {kind}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidRequestError(f"{path}: got more than {MAX_FILE_BYTES} bytes, expected {kind}")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(kind)
            if text is None:
                raise InvalidRequestError(f"{path}: got a file of something else, expected {kind}")
            tensors = _Tensors(file, path)
            document = _filled(_parsed(text, path), "", tensors)
            tensors.ensure_all_read()
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path}: damaged, expected {kind} ({brief(str(error))})") from error
    return document


def _plain(value: Any, where: str, tensors: dict[str, Tensor], kind: str) -> Any:
    """The JSON of a value; its tensors are put among `tensors` by where they stand."""
    if isinstance(value, Tensor):
        tensors[where] = value.detach().to("cpu", copy=True).contiguous()
        return {REFERENCE: where}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}/{index}", tensors, kind) for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key != REFERENCE for key in value):
        return {key: _plain(item, f"{where}/{key}".lstrip("/"), tensors, kind) for key, item in value.items()}
    raise InvalidRequestError(
        f"{where}: got {brief(value)}, which {kind} cannot hold; expected plain values and tensors"
    )


def _parsed(text: str, path: Path) -> dict[str, Any]:
    if len(text) > MAX_JSON_BYTES:
        raise InvalidRequestError(f"{path}: got {len(text)} characters of JSON, expected at most {MAX_JSON_BYTES}")
    try:
        content = json.loads(text, parse_int=_bounded_int, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{path}: its JSON cannot be read ({brief(str(error))})") from error
    if not isinstance(content, dict):
        raise InvalidRequestError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    found: dict[str, Any] = as_json(
        str(path), content, raises=InvalidRequestError, max_values=MAX_VALUES, max_depth=MAX_DEPTH
    )
    return found


class _Tensors:
    """Those of one file; each is read once."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self._unread = set(file.keys())
        if len(self._unread) > MAX_TENSORS:
            raise InvalidRequestError(f"{path}: got {len(self._unread)} tensors, expected at most {MAX_TENSORS}")

    def read(self, name: object, where: str) -> Tensor:
        if not isinstance(name, str) or name not in self._unread:
            raise InvalidRequestError(f"{self._path}: {where}: got the tensor {brief(name)}, which is not there for it")
        self._unread.remove(name)
        tensor: Tensor = self._file.get_tensor(name).clone()
        if tensor.dtype not in DTYPES:
            raise InvalidRequestError(f"{self._path}: {where}: got {tensor.dtype}, expected one of {DTYPES}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidRequestError(f"{self._path}: {where}: got numbers that are not finite; the file is damaged")
        return tensor

    def ensure_all_read(self) -> None:
        """An empty file has one tensor without a name, since it must have one."""
        left = self._unread - {""}
        if left:
            raise InvalidRequestError(f"{self._path}: got the tensor {brief(min(left))}, which nothing refers to")


def _filled(value: Any, where: str, tensors: _Tensors) -> Any:
    if isinstance(value, list):
        return [_filled(item, f"{where}/{index}", tensors) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if value.keys() == {REFERENCE}:
        return tensors.read(value[REFERENCE], where)
    return {key: _filled(item, f"{where}/{key}".lstrip("/"), tensors) for key, item in value.items()}


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no number")
