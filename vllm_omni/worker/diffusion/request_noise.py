"""Random numbers of one request: whatever a sampler or pipeline draws without saying from where comes from the
request's own generators, on the CPU, so that a seed means the same alone and in a crowd, and on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# what is drawn -> the function that draws it by shape
BY_SHAPE: dict[Any, Callable[..., Tensor]] = {torch.randn: torch.randn, torch.rand: torch.rand}
LIKE: dict[Any, Callable[..., Tensor]] = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
INTEGERS = frozenset({torch.randint, torch.randperm})


class RequestNoise(TorchFunctionMode):
    """A context in which the thread that entered it draws from `generators`: one, or one for each output, which then
    are the rows of what is drawn. A call that names its generator keeps it.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self._generators = generators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        named = dict(kwargs or {})
        if named.get("generator") is not None or not _draws(func):
            return func(*args, **named)
        named.pop("generator", None)
        if func in BY_SHAPE and named.get("out") is None:
            shape = _shape(args, named)
            return self._drawn(BY_SHAPE[func], shape, named)
        if func in LIKE:
            named.pop("memory_format", None)
            given = {"dtype": args[0].dtype, "device": args[0].device, **_set(named)}
            return self._drawn(LIKE[func], args[0].shape, given)
        if func in INTEGERS and named.get("out") is None:
            device = named.pop("device", None)
            return func(*args, **named, generator=self._generators[0]).to(device or torch.get_default_device())
        if func is torch.multinomial:
            weights, device = args[0].cpu(), args[0].device
            return func(weights, *args[1:], **named, generator=self._generators[0]).to(device)
        return func(*args, **named)

    def _drawn(self, draw: Callable[..., Tensor], shape: Sequence[int], given: Mapping[str, Any]) -> Tensor:
        """Of this shape, one row from each generator where there is one for each row."""
        own = _set(given)
        device = own.pop("device", None) or torch.get_default_device()
        count = len(self._generators)
        if count > 1 and len(shape) > 1 and shape[0] == count:
            rows = [draw((1, *shape[1:]), generator=generator, **own) for generator in self._generators]
            return torch.cat(rows).to(device)
        return draw(tuple(shape), generator=self._generators[0], **own).to(device)


def _draws(func: Any) -> bool:
    return func in BY_SHAPE or func in LIKE or func in INTEGERS or func is torch.multinomial


def _set(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if value is not None}


def _shape(args: Sequence[Any], named: dict[str, Any]) -> tuple[int, ...]:
    """Of `randn(2, 3)`, `randn((2, 3))` and `randn(size=(2, 3))` alike."""
    if "size" in named:
        return tuple(named.pop("size"))
    return tuple(args[0]) if args and not isinstance(args[0], int) else tuple(args)
