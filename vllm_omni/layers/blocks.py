"""The blocks of a transformer, walked through in order. With `offload: weights` theirs wait in the host's memory, and
each block's come to the device in one copy, which runs while the block before it computes. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vllm_omni.layers.meta_device import give_memory
from vllm_omni.utils.device import Copies

NUM_SLOTS = 2  # one block computes, the next one arrives
ALIGNMENT = 256  # bytes, as torch's own allocator does: how a product is computed may depend on it


class Blocks(nn.ModuleList):
    """Blocks that run one after the other."""

    stream: WeightStream | None = None

    def present(self, start: int = 0, stop: int | None = None) -> Iterator[nn.Module]:
        """Blocks start .. stop - 1. Each is to be used before the next one is asked for: then its weights may go."""
        for index in range(*slice(start, stop).indices(len(self))):
            block = self[index]
            if self.stream is not None:
                self.stream.bring(block)
            yield block


class Part(NamedTuple):
    """A tensor of a block among the bytes of all of them."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def within(self, memory: Tensor) -> Tensor:
        """The tensor there, whose bytes begin with those of the block."""
        return memory[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where the tensors of a block stand, one behind the other."""

    parts: tuple[Part, ...]
    num_bytes: int

    @classmethod
    def of(cls, block: nn.Module) -> BlockLayout:
        """Of its parameters and buffers, which may be on the meta device."""
        parts, end = [], 0
        for tensor in tensors_of(block):
            parts.append(Part(end, tensor.nbytes, tensor.dtype, tensor.shape))
            end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        return cls(tuple(parts), end)


@dataclass(slots=True, eq=False)
class Slot:
    """Memory of the device for one block."""

    memory: Tensor  # uint8
    block: int | None = None  # whose weights are in it, or on their way
    arrival: object = None  # of the copy


class WeightStream:
    """Brings the weights of blocks to the device. Owns where they wait, and two slots where they are used."""

    def __init__(self, lists: Sequence[Blocks], device: torch.device, copies: Copies) -> None:
        """lists: of a model on the meta device, in the order in which they run. They get their memory, not filled."""
        self._blocks = [block for blocks in lists for block in blocks]
        self._index = {id(block): index for index, block in enumerate(self._blocks)}
        self._layouts = [BlockLayout.of(block) for block in self._blocks]
        self._copies = copies
        self._waiting = copies.host_memory(sum(layout.num_bytes for layout in self._layouts))
        self._homes = list(self._waiting.split([layout.num_bytes for layout in self._layouts]))
        largest = max(layout.num_bytes for layout in self._layouts)
        self._slots = [Slot(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(NUM_SLOTS)]
        self._followed: dict[int, int] = {}  # by block, the one that was brought after it last
        self._current: int | None = None
        self._tensors: dict[int, list[Tensor]] = {}
        for index, block in enumerate(self._blocks):
            give_memory(block, torch.device("cpu"))
            self._place(index, self._homes[index], tensors_of(block))
        for blocks in lists:
            blocks.stream = self

    def bring(self, block: nn.Module) -> None:
        """What is computed from now on finds the weights of a block; those of the one before it may be gone."""
        index = self._index[id(block)]
        if index == self._current:
            return
        if self._current is not None:
            self._followed[self._current] = index
        self._current = index
        done = self._copies.mark()
        slot = next((slot for slot in self._slots if slot.block == index), None)
        if slot is None:
            slot = self._slots[0]
            self._fill(slot, index, done)
        self._copies.wait(slot.arrival)
        self._place(index, slot.memory, self._tensors_of(index))
        if slot is self._slots[0]:
            self._slots.reverse()  # the other one stands first now, and what used it has been computed
        expected = self._followed.get(index, (index + 1) % len(self._blocks))
        if expected not in (index, self._slots[0].block):
            self._fill(self._slots[0], expected, done)

    def _fill(self, slot: Slot, index: int, done: object) -> None:
        """Begins the copy of a block into a slot; done: of all that has used it."""
        if slot.block is not None:
            self._place(slot.block, self._homes[slot.block], self._tensors_of(slot.block))
        home = self._homes[index]
        slot.block, slot.arrival = index, self._copies.begin(slot.memory[: len(home)], home, done)

    def _place(self, index: int, memory: Tensor, tensors: Sequence[Tensor]) -> None:
        for tensor, part in zip(tensors, self._layouts[index].parts, strict=True):
            tensor.data = part.within(memory)

    def _tensors_of(self, index: int) -> list[Tensor]:
        """Looked for when weights are used, and have been loaded and laid out."""
        if index not in self._tensors:
            self._tensors[index] = tensors_of(self._blocks[index])
        return self._tensors[index]


@dataclass(frozen=True, slots=True)
class StreamedBytes:
    """Of a model whose blocks are streamed."""

    waiting: int  # in the host's memory
    slots: int  # on the device

    @classmethod
    def of(cls, model: nn.Module) -> StreamedBytes:
        """Of a model on the meta device, its dtype and quantisation chosen."""
        sizes = [BlockLayout.of(block).num_bytes for blocks in lists_of(model) for block in blocks]
        return cls(sum(sizes), NUM_SLOTS * max(sizes, default=0))


NONE_STREAMED = StreamedBytes(0, 0)


def lists_of(model: nn.Module) -> list[Blocks]:
    """All of a model, in the order in which it was built."""
    return [part for part in model.modules() if isinstance(part, Blocks)]


def tensors_of(block: nn.Module) -> list[Tensor]:
    """Its parameters and buffers."""
    return [*block.parameters(), *block.buffers()]
