"""Values that no caller should send: objects that misbehave, and plain ones of the wrong kind or size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch


class NoRepr:
    """Cannot be shown, compared or hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")


class Endless(Sequence[Any]):
    """Says that it is short, and never ends."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        return 1

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield 1


class Raising(Mapping[Any, Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: Any) -> Any:
        raise RuntimeError("no item")

    def __iter__(self) -> Iterator[Any]:
        yield "seed"


class EndlessMapping(Raising):
    def __getitem__(self, key: Any) -> Any:
        return 1

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            yield number
            number += 1


ODD: list[Any] = [
    [],
    {},
    ["a"],
    NoRepr(),
    Endless(),
    Raising(),
    EndlessMapping(),
    torch.zeros(3),
    np.zeros((2, 2)),
    np.array(["x"]),
    torch.tensor(float("nan")),
    float("inf"),
    10**5000,
    object(),
    b"bytes",
    lambda: 1,
    True,
    "\ud800",
]
