"""YAML text into plain values, within bounds that are checked first: size, number of nodes, depth, aliases."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vllm_omni.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 32


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a file holds, interpolations untouched."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"more than {MAX_FILE_BYTES} bytes, expected a stage config")
    return parse_mapping(text)


def parse_mapping(text: str) -> dict[str, Any]:
    """The mapping that a YAML document holds, interpolations untouched; duplicate keys are errors."""
    is_mapping = _check_bounds(text)
    if not is_mapping:
        raise ConfigError("got no mapping at the top, expected keys such as 'stages' and 'outputs'")
    return plain(_guarded_load(text))


def parse_value(text: str) -> Any:
    """The value of an override: YAML on one line ('0.1', 'null', '[image]', '{policy: none}')."""
    _check_bounds(text)
    try:
        return plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except Exception as error:  # the library raises whatever its constructors of values raise
        raise ConfigError(_one_line(error)) from error


def plain(config: Any) -> dict[str, Any]:
    """An OmegaConf mapping as dicts and lists, interpolations untouched."""
    content = OmegaConf.to_container(config, resolve=False)
    return content if isinstance(content, dict) else {}


def resolve(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree with every interpolation (`${model}`, `${oc.env:NAME,default}`) replaced by its value."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}{_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError("an interpolation refers to itself") from error
    return resolved if isinstance(resolved, dict) else {}


def _guarded_load(text: str) -> Any:
    try:
        return OmegaConf.load(io.StringIO(text))
    except Exception as error:  # the library raises whatever its constructors of values raise
        raise ConfigError(_one_line(error)) from error


@dataclass(slots=True)
class _Node:
    anchor: str | None
    first: int
    height: int = 1
    size: int = 1


def _check_bounds(text: str) -> bool:
    """Counts nodes with every alias written out, without building them. Returns whether the document is a mapping."""
    anchors: dict[str, _Node] = {}
    stack = [_Node(None, 0, 0)]
    is_mapping = False
    num_nodes = 0
    for event in _events(text):
        if isinstance(event, yaml.CollectionStartEvent):
            is_mapping |= len(stack) == 1 and isinstance(event, yaml.MappingStartEvent)
            stack.append(_Node(event.anchor, num_nodes))
            num_nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            node = stack.pop()
            node.size = num_nodes - node.first
            _attach(node, stack[-1], anchors)
        elif isinstance(event, yaml.ScalarEvent):
            num_nodes += 1
            _attach(_Node(event.anchor, num_nodes), stack[-1], anchors)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise ConfigError(
                    f"{_place(event.start_mark)}: the alias *{event.anchor} refers to itself or to nothing"
                )
            num_nodes += anchors[event.anchor].size
            _attach(anchors[event.anchor], stack[-1], anchors)
        if num_nodes > MAX_NODES or len(stack) - 1 + stack[-1].height > MAX_DEPTH:
            raise ConfigError(
                f"{_place(event.start_mark)}: more than {MAX_NODES} values or {MAX_DEPTH} levels, aliases written out"
            )
    return is_mapping


def _attach(node: _Node, parent: _Node, anchors: dict[str, _Node]) -> None:
    parent.height = max(parent.height, node.height + 1)
    if node.anchor is not None:
        anchors[node.anchor] = node


def _events(text: str) -> Any:
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{_place(error.problem_mark)}: {error.problem}"
    words = str(error).split("\n", 1)[0] or type(error).__name__
    if isinstance(error, (yaml.YAMLError, OmegaConfBaseException)):
        return words
    return f"a value does not fit its tag, or is too large to read ({words})"


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
