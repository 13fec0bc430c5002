"""Requests that go on later, as files: safetensors whose header says what was asked. Pictures that the request brought
are in the file, as pixels; nothing outside of it is named or opened.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllm_omni import __version__
from vllm_omni.config.builder import check_known
from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.media.image_input import read_image
from vllm_omni.params import DiffusionParams, SamplingParams, StageParams
from vllm_omni.payload import SavedStage
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief
from vllm_omni.utils.files import user_path
from vllm_omni.utils.tensor_document import read_document, write_document

KIND = "vllm_omni.state"
SUFFIX = ".safetensors"
KEYS = frozenset({"version", "config", "request", "params", "stages"})
REQUEST_KEYS = ("request_id", "prompt", "negative_prompt", "priority", "timeout_s", "outputs", "fields")
PARAMS_TYPES: Mapping[str, type[StageParams]] = {each.__name__: each for each in (SamplingParams, DiffusionParams)}


def state_path(name: str | Path) -> Path:
    """Where a state can be written; InvalidRequestError for a name that says something else."""
    path = user_path("path", name, raises=InvalidRequestError)
    if path.suffix.lower() != SUFFIX:
        raise InvalidRequestError(f"path: got {str(name)!r}, expected a name that ends in {SUFFIX}")
    return path


def write_state(path: Path, request: OmniRequest, config: str, limits: LimitsConfig) -> None:
    """request: of `OmniExecutor.save_state`. config: the name of what it runs on, for who goes on. InvalidRequestError
    for what no file could hold and where it cannot be written.
    """
    params = request.params if isinstance(request.params, Mapping) else {}
    document = {
        "version": __version__,
        "config": config,
        "request": {name: _storable(name, getattr(request, name), limits) for name in REQUEST_KEYS},
        "params": {stage: _params_content(stage, each, limits) for stage, each in params.items()},
        "stages": {
            stage: {"fingerprint": dict(saved.fingerprint), "content": dict(saved.content)}
            for stage, saved in request.saved.items()
        },
    }
    write_document(path, KIND, document)


def read_state(path: str | Path) -> OmniRequest:
    """The request of a file that `save_state` wrote: `Omni.generate` and `Omni.stream` go on with it.
    InvalidRequestError for any other file, and for one of another version of this package.
    """
    return _request_of(_document(path), str(path))


def config_name(path: str | Path) -> str:
    """The name of the config that a state was saved on."""
    return str(_document(path)["config"])


def _document(path: str | Path) -> dict[str, Any]:
    document = read_document(path, KIND)
    version = document.get("version")
    if version != __version__:
        raise InvalidRequestError(
            f"{path}: got a state of vllm_omni {brief(version)}, expected {__version__}; go on with that version"
        )
    if document.keys() != KEYS or not all(isinstance(document[key], Mapping) for key in KEYS - {"version", "config"}):
        raise InvalidRequestError(f"{path}: got the keys {brief(sorted(document))}, expected {sorted(KEYS)}")
    return document


def _request_of(document: Mapping[str, Any], where: str) -> OmniRequest:
    given = {name: _usable(value) for name, value in document["request"].items()}
    if given.keys() != set(REQUEST_KEYS):
        raise InvalidRequestError(f"{where}: request: got {brief(sorted(given))}, expected {sorted(REQUEST_KEYS)}")
    params = {stage: _params_of(content, f"{where}: params.{stage}") for stage, content in document["params"].items()}
    saved = {stage: _stage_of(content, f"{where}: stages.{stage}") for stage, content in document["stages"].items()}
    if not saved:
        raise InvalidRequestError(f"{where}: stages: got none, expected one to go on with")
    return OmniRequest(**given, params=params, saved=saved)


def _stage_of(content: object, where: str) -> SavedStage:
    keys = {"fingerprint", "content"}
    if (
        not isinstance(content, Mapping)
        or content.keys() != keys
        or not all(isinstance(content[k], Mapping) for k in keys)
    ):
        raise InvalidRequestError(f"{where}: got {brief(content)}, expected {sorted(keys)}")
    return SavedStage(content["fingerprint"], content["content"])


def _params_content(stage: str, params: StageParams, limits: LimitsConfig) -> dict[str, Any]:
    name = type(params).__name__
    if PARAMS_TYPES.get(name) is not type(params):
        raise InvalidRequestError(
            f"params of stage {stage!r}: got {name}, expected {' or '.join(PARAMS_TYPES)} to be saved"
        )
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return {"type": name, "set": {k: _storable(k, v, limits) for k, v in values.items() if v is not None}}


def _params_of(content: object, where: str) -> StageParams:
    if not isinstance(content, Mapping) or content.keys() != {"type", "set"} or not isinstance(content["set"], Mapping):
        raise InvalidRequestError(f"{where}: got {brief(content)}, expected 'type' and 'set'")
    name = content["type"]
    params_type = PARAMS_TYPES.get(name) if isinstance(name, str) else None
    if params_type is None:
        raise InvalidRequestError(f"{where}: got the type {brief(name)}, expected {' or '.join(PARAMS_TYPES)}")
    try:
        for field in content["set"]:
            check_known(field, {each.name for each in dataclasses.fields(params_type)}, where)
        values = {field: _usable(value) for field, value in content["set"].items()}
        if isinstance(values.get("logit_bias"), dict):  # JSON has no integers for names
            values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
        return params_type(**values)
    except InvalidRequestError:
        raise
    except (ConfigError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"{where}: {error}") from error


def _storable(name: str, value: Any, limits: LimitsConfig) -> Any:
    """Plain values as they are, pictures as their pixels [H, W, 4]."""
    is_picture = isinstance(value, Image.Image | np.ndarray | bytes | bytearray | memoryview | os.PathLike)
    if is_picture or (isinstance(value, str) and name in ("image", "mask")):
        return read_image(value, limits, name, "RGBA")
    if isinstance(value, Mapping):
        return {str(key): _storable(str(key), item, limits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(name, item, limits) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _storable(f.name, getattr(value, f.name), limits) for f in dataclasses.fields(value)}
    return value


def _usable(value: Any) -> Any:
    """Pictures as a caller would bring them."""
    if isinstance(value, Tensor):
        if value.dtype != torch.uint8 or value.dim() != 3 or value.shape[2] != 4 or not value.numel():
            raise InvalidRequestError(
                f"a saved picture: got {value.dtype} {list(value.shape)}, expected uint8 [H, W, 4]"
            )
        return Image.fromarray(value.numpy())
    if isinstance(value, dict):
        return {name: _usable(item) for name, item in value.items()}
    return [_usable(item) for item in value] if isinstance(value, list) else value
