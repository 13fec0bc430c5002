"""The tensors of one frame: small ones stand in the frame, large ones lie side by side in one segment, and those that
lie in a segment already stay there. Says how, in plain values that the other side checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_omni.executor.process.segments import Segment, Segments, bytes_of
from vllm_omni.executor.wire.base import INLINE_BYTES, MAX_ITEMS, WireError
from vllm_omni.utils.checks import brief

ALIGNMENT = 64
MAX_LENT = 64  # segments of one frame, each of which may bring a descriptor
MAX_DIMS = 64
MAX_INLINE_BYTES = 256 * 1024  # of all tensors that stand in one frame
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}


class Parcel:
    """Collects the tensors of a frame while its message is encoded (`put`), then packs them."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._tensors: list[Tensor] = []

    def put(self, tensor: Tensor) -> int:
        """What stands for the tensor in the message."""
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise WireError(f"got a tensor of the layout {tensor.layout}, which cannot be sent to another process")
        if len(self._tensors) == MAX_ITEMS:
            raise WireError(f"got more than {MAX_ITEMS} tensors in one message")
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def pack(self) -> tuple[list[Any], list[tuple[Segment, Any]]]:
        """The entries of the tensors, each with its dtype and shape and its bytes, or which of the segments it lies in
        and where; and the segments: each with what must be kept until the other side has done with it, None for a
        segment of this frame alone.
        """
        entries: list[Any] = []
        lent: list[tuple[Segment, Any]] = []
        copies: list[tuple[Tensor, list[Any]]] = []
        inline_bytes = 0
        for tensor in self._tensors:
            entry: list[Any] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            found = self._segments.holding(tensor)
            if found is not None and len(lent) < MAX_LENT - 1:
                lent.append((found, tensor))
                entry += [len(lent) - 1, tensor.data_ptr() - found.address]
            elif tensor.nbytes <= INLINE_BYTES and inline_bytes + tensor.nbytes <= MAX_INLINE_BYTES:
                inline_bytes += tensor.nbytes
                entry.append(_plain_bytes(tensor))
            else:
                copies.append((tensor, entry))
            entries.append(entry)
        if copies:
            lent.append((self._copied(copies, len(lent)), None))
        return entries, lent

    def _copied(self, copies: Sequence[tuple[Tensor, list[Any]]], index: int) -> Segment:
        """One segment that holds them all: the one copy on their way."""
        offsets, end = [], 0
        for tensor, _ in copies:
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        segment = self._segments.take(end)
        memory = bytes_of(segment)
        for (tensor, entry), offset in zip(copies, offsets, strict=True):
            memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            entry += [index, offset]
        return segment


def unpacked(entry: Any, memories: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The tensor of one entry. memories: by place among the frame's segments, uint8 [n]. WireError for a lie."""
    if not isinstance(entry, list) or len(entry) not in (3, 4):
        raise WireError(f"got {brief(entry)}, expected the entry of a tensor")
    name, shape, *rest = entry
    if not isinstance(name, str) or name not in DTYPES:
        raise WireError(f"got a tensor of the dtype {brief(name)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(f"got a tensor of the shape {brief(shape)}")
    dtype, num_bytes = DTYPES[name], math.prod(shape) * DTYPES[name].itemsize
    if len(rest) == 1:
        return _of_bytes(rest[0], dtype, shape, num_bytes)
    index, offset = rest
    if type(index) is not int or not 0 <= index < len(memories) or type(offset) is not int:
        raise WireError(f"got a tensor in segment {brief(index)} of {len(memories)}, at {brief(offset)}")
    memory = memories[index]()
    if offset < 0 or offset % dtype.itemsize or offset + num_bytes > len(memory):
        raise WireError(f"got a tensor of {num_bytes} bytes at {offset} of {len(memory)}")
    return memory[offset : offset + num_bytes].view(dtype).view(shape)


def _plain_bytes(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _of_bytes(content: Any, dtype: torch.dtype, shape: list[int], num_bytes: int) -> Tensor:
    if not isinstance(content, bytes) or len(content) != num_bytes:
        got = len(content) if isinstance(content, bytes) else type(content).__name__
        raise WireError(f"got {got} bytes for a tensor {dtype} {shape}")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).view(shape)
