"""Modules that are made on the meta device: shapes and names alone, until a checkpoint's tensors take their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vllm_omni.utils.memory_pages import in_huge_pages


@contextmanager
def on_meta_device() -> Iterator[None]:
    """No module made here draws first values, which the checkpoint's replace: on this device, a normal distribution
    alone has torch import its compiler, which takes as long as all else that a language model imports.
    """
    with torch.device("meta"), _Undrawn():
        yield


def give_memory(model: nn.Module, device: torch.device, *, recurse: bool = True) -> None:
    """As `nn.Module.to_empty`, which on its way imports half of torch's compiler too."""

    def empty(tensor: Tensor) -> Tensor:
        return in_huge_pages(torch.empty(tensor.shape, dtype=tensor.dtype, device=device))

    for module in model.modules() if recurse else (model,):
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, nn.Parameter(empty(parameter), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, empty(buffer))


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where `torch.nn.init` would fill them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
