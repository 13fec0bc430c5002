"""Stage configs: YAML + overrides -> OmniConfig. Every key is checked; nothing is accepted and ignored.

Knows engine classes only through the registry, for the types of a stage kind's own keys and of its default parameters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_omni import registry
from vllm_omni.config.builder import build, check_known, construct, convert, join
from vllm_omni.config.document import (
    STAGE_KEYS,
    TOP_LEVEL_KEYS,
    ConfigDocument,
    DType,
    Offload,
    Quantization,
    check_stage_name,
)
from vllm_omni.config.parsing import parse_value, read_yaml, resolve
from vllm_omni.config.plugins import import_modules, load_entry_points
from vllm_omni.config.schema import PROCESS, OmniConfig, StageConfig
from vllm_omni.config.shipped import find_config
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, did_you_mean

EDGE_DEPTH = len(("stages", "<stage>", "inputs", "<port>"))

_DEVICE = re.compile(r"auto|[a-z]+(:\d+)?")
_REFERS_TO_MODEL = re.compile(r"\$\{[^}]*\bmodel\b")


def load_config(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), model: str | None = None
) -> OmniConfig:
    """A checked configuration.

    config: a YAML file, the name of a shipped one, or the same content as a mapping. overrides: "image.width=64"; the
    first part is a stage or a top-level key, the value is YAML and replaces what stood there. model: replaces the
    file's `model`. Raises ConfigError with the file, the whole key, what it got and what it expected.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides: got the string {brief(overrides)}, expected a list of strings")
    load_entry_points()
    source = "config" if isinstance(config, Mapping) else str(find_config(config))
    try:
        tree = _copied(config) if isinstance(config, Mapping) else read_yaml(Path(source))
        stage_names = _checked_stage_names(tree)
        if model is not None:
            tree["model"] = model
        for override in overrides:
            _apply_override(tree, override, stage_names)
        return _build(tree, None if isinstance(config, Mapping) else Path(source).absolute().parent)
    except ConfigError as error:
        changed = f" with {', '.join(overrides)}" if overrides else ""
        raise ConfigError(f"{source}{changed}: {error}") from error


def _copied(value: Any) -> Any:
    """Plain dicts and lists, so that the caller's mapping stays as it is."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _checked_stage_names(tree: Mapping[str, Any]) -> list[str]:
    for key in tree:
        check_known(key, TOP_LEVEL_KEYS, "")
    stages = tree.get("stages")
    if not isinstance(stages, Mapping) or not stages:
        raise ConfigError(
            f"stages: got {'nothing' if stages is None else repr(stages)}, expected one or more stages by name"
        )
    for name in stages:
        check_stage_name(name)
    return list(stages)


def _apply_override(tree: dict[str, Any], override: str, stage_names: Sequence[str]) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override: got {override!r}, expected key=value such as image.cache.threshold=0.1")
    if parts[0] in stage_names:
        parts.insert(0, "stages")
    elif parts[0] not in TOP_LEVEL_KEYS:
        raise ConfigError(
            f"override {key!r}: no stage and no top-level key{did_you_mean(parts[0], {*stage_names, *TOP_LEVEL_KEYS})}"
        )
    if parts[0] == "stages" and (len(parts) < 3 or parts[1] not in stage_names):
        raise ConfigError(
            f"override {key!r}: expected stages.<name>.<key>{did_you_mean('.'.join(parts[1:2]), stage_names)}"
        )
    try:
        value = parse_value(text)
    except ConfigError as error:
        raise ConfigError(f"override {key!r}: {error}") from error
    group: Any = tree
    for depth, part in enumerate(parts[:-1], start=1):
        if group.get(part) is None:
            group[part] = {}
        if depth == EDGE_DEPTH and parts[2] == "inputs" and isinstance(group[part], str):
            group[part] = {"from": group[part]}  # the short form of an edge gets a key more
        group = group[part]
        if not isinstance(group, dict):
            raise ConfigError(f"override {key!r}: {'.'.join(parts[:depth])} is {brief(group)}, not a group of keys")
    group[parts[-1]] = value


def _build(tree: dict[str, Any], folder: Path | None) -> OmniConfig:
    """folder: of the file, None for a mapping."""
    if tree.get("model") is None:
        tree.pop("model", None)
    elif not any(_refers_to_model(stage) for stage in tree["stages"].values()):
        raise ConfigError(f"model: got {tree['model']!r}, which no stage uses; write 'model: ${{model}}' in a stage")
    document = build(ConfigDocument, resolve(tree))
    import_modules([document.imports] if isinstance(document.imports, str) else document.imports, folder)
    stages = {name: _build_stage(name, section, document) for name, section in document.stages.items()}
    if document.process is not None and not any(stage.process for stage in stages.values()):
        raise ConfigError(f"process: got {document.process!r}, but no stage has `executor: process`")
    config = document.with_stages(stages)
    config.validate()
    return config


def _refers_to_model(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_refers_to_model(item) for item in value.values())
    if isinstance(value, list):
        return any(_refers_to_model(item) for item in value)
    return isinstance(value, str) and _REFERS_TO_MODEL.search(value) is not None


def _build_stage(name: str, section: Mapping[str, Any], document: ConfigDocument) -> StageConfig:
    key = f"stages.{name}"
    engine = registry.resolve("stage kind", _registered("stage kind", section.get("kind"), f"{key}.kind"))
    options_type = engine.options_type
    known = STAGE_KEYS | {f.name for f in dataclasses.fields(options_type)}
    for item in section:
        check_known(item, known, key)
    common = {item: value for item, value in section.items() if item in STAGE_KEYS}
    own = {item: value for item, value in section.items() if item not in STAGE_KEYS}
    shared = {
        "device": document.device,
        "dtype": document.dtype,
        "executor": document.executor,
        "process": document.process,
        "revision": document.revision,
    }
    values = {**shared, **common, "name": name}
    stage = build(StageConfig, {**values, "options": build(options_type, own, key)}, key)
    if stage.executor != "auto":
        _registered("executor", stage.executor, f"{key}.executor")
    if stage.process == "" or ("process" in section and stage.process is not None and stage.executor != PROCESS):
        raise ConfigError(
            f"{key}.process: got {stage.process!r} beside executor {stage.executor!r}, expected the name of a process "
            "beside `executor: process`"
        )
    if stage.executor != PROCESS:  # the top level's is not meant for it
        stage = dataclasses.replace(stage, process=None)
    convert(DType, stage.dtype, f"{key}.dtype")
    convert(Quantization, stage.quantization, f"{key}.quantization")
    convert(Offload, stage.offload, f"{key}.offload")
    for item, device in [("device", stage.device), *(("devices", device) for device in stage.devices)]:
        if not _DEVICE.fullmatch(device):
            raise ConfigError(f"{key}.{item}: got {device!r}, expected auto, cpu, cuda, cuda:N or mps")
    if stage.devices:
        if "device" in section:
            raise ConfigError(f"{key}.device: stands beside `devices`; keep one of them")
        stage = dataclasses.replace(stage, device=stage.devices[0])
    if stage.model == "":
        raise ConfigError(f"{key}.model: got '', expected a folder, a hub id 'owner/name' or 'asset://name'")
    return dataclasses.replace(stage, defaults=_checked_defaults(stage.defaults, engine.params_type, f"{key}.defaults"))


def _registered(table: str, name: Any, key: str) -> str:
    known = registry.names(table)
    if name is None:
        raise ConfigError(f"{key}: missing; expected one of {', '.join(known)}")
    if name not in known:
        raise ConfigError(f"{key}: got {brief(name)}, expected one of {', '.join(known)}{_if_close(name, known)}")
    return str(name)


def _if_close(name: object, known: Sequence[str]) -> str:
    words = did_you_mean(str(name), known)
    return words if "did you mean" in words else ""


def _checked_defaults(defaults: Mapping[str, Any], params_type: type, key: str) -> dict[str, Any]:
    """The defaults that are set, after the kind's params class has accepted them."""
    known = frozenset(f.name for f in dataclasses.fields(params_type))
    for name in defaults:
        check_known(name, known, key)
    given = {name: value for name, value in defaults.items() if value is not None}
    for name, value in given.items():
        try:
            construct(params_type, {name: value}, key)
        except TypeError as error:
            raise ConfigError(f"{join(key, name)}: got {brief(value)}, which has the wrong type ({error})") from error
    construct(params_type, given, key)
    return given
