"""Blocks of a diffusion transformer compiled by torch, once for each shape class: how many rows of which lengths a
batch has. Knows no model.

A class is compiled at its first step: which ones come depends on the lengths of prompts, so that loading could only
guess. All blocks of a stack share what is compiled.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.layers.blocks import lists_of
from vllm_omni.layers.lora import acting

MAX_CLASSES = 8  # as many as torch keeps of one function; batches of others are computed as without compiling

logger = logging.getLogger(__name__)


class CompiledStack:
    """The largest stack of blocks of a model."""

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        """backend: of torch.compile."""
        self._classes: set[Any] = set()
        blocks = max(lists_of(model), key=len)
        self.plain: Callable[..., Any] = type(blocks[0]).forward
        self.compiled = torch.compile(self.plain, dynamic=False, backend=backend)
        for block in blocks:
            block.forward = _Choice(self, block)

    @property
    def num_classes(self) -> int:
        return len(self._classes)

    def takes(self, arguments: Sequence[Any]) -> bool:
        """Whether blocks are compiled for a batch: adapters act on none that are."""
        if acting() is not None:
            return False
        shape_class = _shapes(arguments)
        if shape_class in self._classes:
            return True
        if len(self._classes) == MAX_CLASSES:
            return False
        self._classes.add(shape_class)
        logger.info("compiling blocks for shape class %d of at most %d", len(self._classes), MAX_CLASSES)
        return True


class _Choice:
    """The forward pass of one block, plain or compiled. Does not keep the block, which keeps it."""

    def __init__(self, stack: CompiledStack, block: nn.Module) -> None:
        self._stack, self._block = stack, weakref.ref(block)

    def __call__(self, *arguments: Any) -> Any:
        stack = self._stack
        return (stack.compiled if stack.takes(arguments) else stack.plain)(self._block(), *arguments)


def _shapes(value: Any) -> Any:
    """What of a value decides which code computes it."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, value))
    if is_dataclass(value):
        return tuple(_shapes(getattr(value, field.name)) for field in fields(value))
    return (value.start, value.stop) if isinstance(value, slice) else value
