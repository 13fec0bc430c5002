"""What a decoder carries from one frame to the next: by layer a tensor for every request that runs.

A layer that looks back is `Carrying`: it reads what it left behind after the last frame and leaves what the next one
needs. `StatePool` holds the states of all requests in slots of tensors that are made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vllm_omni.errors import StageError

CodecState = dict[str, Tensor]  # key of a layer -> [B, ...]; replaced, never written into


class Carrying(nn.Module):
    """A layer with a state. Its key is given by the model that holds it."""

    key: str = ""
    carried_dtype: ClassVar[torch.dtype | None] = None  # None: the model's

    @property
    def carried_shape(self) -> tuple[int, ...]:
        """Of one request; at its beginning all zeros."""
        raise NotImplementedError


class StatePool:
    """Slots for the states of up to `num_slots` requests. The owner of the slots takes and frees them."""

    def __init__(
        self, layers: Mapping[str, Carrying], num_slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._tensors = fresh_state(layers, num_slots, device, dtype)
        self._free = list(reversed(range(num_slots)))
        self._num_slots = num_slots

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A slot with the state of a beginning."""
        slot = self._free.pop()
        for tensor in self._tensors.values():
            tensor[slot].zero_()
        return slot

    def free(self, slot: int) -> None:
        if slot in self._free or not 0 <= slot < self._num_slots:
            raise StageError(f"slot {slot} of {self._num_slots} is freed, but it is not taken")
        self._free.append(slot)

    def read(self, slots: Sequence[int]) -> CodecState:
        index = torch.tensor(slots)
        return {key: tensor.index_select(0, index.to(tensor.device)) for key, tensor in self._tensors.items()}

    def write(self, slots: Sequence[int], state: CodecState) -> None:
        index = torch.tensor(slots)
        for key, tensor in self._tensors.items():
            tensor.index_copy_(0, index.to(tensor.device), state[key])


def fresh_state(layers: Mapping[str, Carrying], num_rows: int, device: torch.device, dtype: torch.dtype) -> CodecState:
    """Of `num_rows` beginnings."""
    return {
        key: torch.zeros(num_rows, *layer.carried_shape, device=device, dtype=layer.carried_dtype or dtype)
        for key, layer in layers.items()
    }


def state_bytes(layers: Mapping[str, Carrying], dtype: torch.dtype) -> int:
    """Of one request."""
    sizes = ((torch.Size(layer.carried_shape).numel(), layer.carried_dtype or dtype) for layer in layers.values())
    return sum(count * kind.itemsize for count, kind in sizes)
