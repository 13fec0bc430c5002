"""The attributes of an object that change while it works: taken from one and put into a fresh one of the same kind,
which then goes on as the first would have. Values are tensors, numbers, None and lists of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.checks import brief

MAX_ITEMS = 1_000  # of a list; histories hold a few steps


def take_kept(owner: object, names: Sequence[str]) -> dict[str, Any]:
    """By name. Lists are copies, tensors are not: whoever works replaces them and writes into none."""
    values = vars(owner)
    return {name: list(values[name]) if isinstance(values[name], list) else values[name] for name in names}


def put_kept(owner: object, names: Sequence[str], values: Mapping[str, Any]) -> None:
    """Sets them as they are; InvalidRequestError for other names or kinds of values."""
    if values.keys() != set(names):
        raise InvalidRequestError(
            f"the saved {type(owner).__name__}: got {brief(sorted(values))}, expected {sorted(names)}"
        )
    for name in names:
        _check(values[name], f"the saved {type(owner).__name__}: {name}")
    for name in names:
        setattr(owner, name, values[name])


def on_device(value: Any, device: torch.device) -> Any:
    """A copy of mappings and lists in which every tensor is on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: on_device(item, device) for name, item in value.items()}
    return [on_device(item, device) for item in value] if isinstance(value, list) else value


def _check(value: object, where: str) -> None:
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_ITEMS or not all(
        item is None or isinstance(item, bool | int | float | torch.Tensor) for item in items
    ):
        raise InvalidRequestError(f"{where}: got {brief(value)}, expected tensors and numbers, at most {MAX_ITEMS}")
