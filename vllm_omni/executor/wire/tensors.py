"""The tensors of a message as plain values: the dtype and shape of each, and its bytes or where they lie in memory that
the transport hands over beside it. Trusts none that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.executor.wire.base import MAX_ITEMS, WireError
from vllm_omni.utils.checks import brief
from vllm_omni.utils.device_memory import DeviceHandle, FarTensor

MAX_DIMS = 64
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}


class TensorList:
    """Collects the tensors of a message while it is encoded."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def put(self, tensor: Tensor) -> int:
        """What stands for the tensor in the message: its place in the list."""
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise WireError(f"got a tensor of the layout {tensor.layout}, which cannot be sent to another process")
        if len(self.tensors) == MAX_ITEMS:
            raise WireError(f"got more than {MAX_ITEMS} tensors in one message")
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def entry_of(tensor: Tensor) -> list[Any]:
    """The begin of its entry, to which its bytes are to be added, or the place of a memory and the offset in it."""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def plain_bytes(tensor: Tensor) -> bytes:
    """Its content in order, whatever its strides and its device."""
    if not tensor.numel():
        return b""
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def entry_at(entries: Any, index: Any) -> Any:
    """The entry that stands for a tensor in the message."""
    if type(index) is not int or index < 0:
        raise WireError(f"got {brief(index)}, expected the place of a tensor")
    return entries[index]


def unpacked(entry: Any, memories: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The tensor of one entry. memories: by place among the message's memories, uint8 [n]. WireError for a lie."""
    dtype, shape, rest = opened_entry(entry)
    num_bytes = math.prod(shape) * dtype.itemsize
    if len(rest) == 1:
        return _of_bytes(rest[0], dtype, shape, num_bytes)
    index, offset = rest
    if type(index) is not int or not 0 <= index < len(memories) or type(offset) is not int:
        raise WireError(f"got a tensor in segment {brief(index)} of {len(memories)}, at {brief(offset)}")
    memory = memories[index]()
    if offset < 0 or offset % dtype.itemsize or offset + num_bytes > len(memory):
        raise WireError(f"got a tensor of {num_bytes} bytes at {offset} of {len(memory)}")
    return memory[offset : offset + num_bytes].view(dtype).view(shape)


def opened_entry(entry: Any) -> tuple[torch.dtype, list[int], list[Any]]:
    """dtype and shape of the tensor of one entry; and its bytes, or the place of a memory and the offset in it."""
    if not isinstance(entry, list) or len(entry) not in (3, 4):
        raise WireError(f"got {brief(entry)}, expected the entry of a tensor")
    name, shape, *rest = entry
    return _dtype(name, shape), shape, rest


def far_tensor(entry: Any, is_gone: Callable[[], bool]) -> FarTensor:
    """The tensor of an entry that holds a handle, which is not opened; is_gone: as of a FarTensor. WireError for a
    lie.
    """
    name, shape, device, handle, num_bytes, offset = entry
    dtype = _dtype(name, shape)
    is_handle = isinstance(device, str) and isinstance(handle, bytes)
    if not is_handle or type(num_bytes) is not int or type(offset) is not int:
        raise WireError(f"got {brief(entry)}, expected the handle of a tensor")
    try:
        return FarTensor.of(DeviceHandle(device, handle, num_bytes, offset), shape, dtype, is_gone)
    except (StageError, RuntimeError, OverflowError) as error:
        raise WireError(f"got a tensor that lies nowhere ({error})") from error


def _dtype(name: Any, shape: Any) -> torch.dtype:
    """Of an entry whose dtype and shape are such."""
    if not isinstance(name, str) or name not in DTYPES:
        raise WireError(f"got a tensor of the dtype {brief(name)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(f"got a tensor of the shape {brief(shape)}")
    return DTYPES[name]


def _of_bytes(content: Any, dtype: torch.dtype, shape: list[int], num_bytes: int) -> Tensor:
    if not isinstance(content, bytes) or len(content) != num_bytes:
        got = len(content) if isinstance(content, bytes) else type(content).__name__
        raise WireError(f"got {got} bytes for a tensor {dtype} {shape}")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).view(shape)
