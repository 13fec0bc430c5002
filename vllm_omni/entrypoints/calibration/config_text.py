"""The key `cache` of one stage in the text of a config, all the rest left as it is: comments, order, interpolations."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from vllm_omni.config.parsing import parse_mapping
from vllm_omni.errors import ConfigError

WIDTH = 120


def cache_line(cache: Mapping[str, Any]) -> str:
    """`cache: {policy: teacache, ...}` on one line."""
    written = yaml.safe_dump(dict(cache), default_flow_style=True, sort_keys=False, width=float("inf"))
    return f"cache: {written.strip()}"


def with_cache(text: str, stage: str, cache: Mapping[str, Any]) -> str:
    """The text with `cache` of this stage set. ConfigError where that would change anything else, as where another
    stage is an alias of this one.
    """
    expected = parse_mapping(text)
    expected["stages"][stage]["cache"] = dict(cache)
    node = _value(_value(yaml.compose(text, Loader=yaml.SafeLoader), "stages"), stage)
    changed = _changed(text, node, cache) if isinstance(node, yaml.MappingNode) and node.value else text
    if parse_mapping(changed) != expected:
        raise ConfigError(
            f"stages.{stage}: 'cache' cannot be written without changing something else; put this line there by hand:"
            f" {cache_line(cache)}"
        )
    return changed


def _changed(text: str, stage: yaml.MappingNode, cache: Mapping[str, Any]) -> str:
    line = cache_line(cache)
    old = next(((key, value) for key, value in stage.value if key.value == "cache"), None)
    if old is not None:
        column = old[0].start_mark.column
        start, end = old[0].start_mark.index, _end(old[1])
        return text[:start] + (line if stage.flow_style else _wrapped(line, column)) + text[end:]
    end = _end(stage.value[-1][1])
    if stage.flow_style:
        return f"{text[:end]}, {line}{text[end:]}"
    column = stage.value[0][0].start_mark.column
    newline = text.find("\n", end)
    rest = len(text) if newline < 0 else newline  # a comment may stand behind the last value
    return f"{text[:rest]}\n{' ' * column}{_wrapped(line, column)}{text[rest:]}"


def _wrapped(line: str, column: int) -> str:
    """Broken at spaces; a mapping in braces goes on in lines that are indented more."""
    inner = " " * (column + 2)
    return "\n".join(
        textwrap.wrap(line, WIDTH - column, subsequent_indent=inner, break_long_words=False, break_on_hyphens=False)
    )


def _value(node: Any, key: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), None)


def _end(node: yaml.Node) -> int:
    """Where the last character of a value stands; the mark of a block lies at whatever follows it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return int(node.end_mark.index)
