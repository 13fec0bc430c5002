"""Plain values and tensors as one run of bytes, which is what a rank is told of a step. Never unpickles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import torch
from torch import Tensor

from vllm_omni.errors import StageError

LENGTH_BYTES = 8  # of each of the two lengths that a frame begins with
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
}


def encode(plain: Any, tensors: Sequence[Tensor]) -> Tensor:
    """plain: what msgpack knows -> [n] uint8: its length, that of what it says of the tensors, then all of them."""
    tensors = [tensor.detach().contiguous() for tensor in tensors]
    shapes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    head = msgpack.packb([plain, shapes])
    size = 2 * LENGTH_BYTES + len(head) + sum(tensor.nbytes for tensor in tensors)
    lengths = size.to_bytes(LENGTH_BYTES, "little") + len(head).to_bytes(LENGTH_BYTES, "little")
    start = torch.frombuffer(bytearray(lengths + head), dtype=torch.uint8)
    return torch.cat([start, *(tensor.cpu().reshape(-1).view(torch.uint8) for tensor in tensors)])


def length_of(start: Tensor) -> int:
    """Bytes of the frame that begins with these, at least LENGTH_BYTES of them."""
    return int.from_bytes(start[:LENGTH_BYTES].numpy().tobytes(), "little")


def decode(frame: Tensor) -> tuple[Any, list[Tensor]]:
    """What `encode` was given; the tensors are the frame's memory where that is aligned. StageError for any other."""
    content = frame.numpy().data
    head_length = int.from_bytes(content[LENGTH_BYTES : 2 * LENGTH_BYTES], "little")
    start = 2 * LENGTH_BYTES + head_length
    if length_of(frame) != len(frame) or start > len(frame):
        raise StageError(f"a frame of {len(frame)} bytes says that it has {length_of(frame)}")
    plain, shapes = msgpack.unpackb(content[2 * LENGTH_BYTES : start])
    tensors = []
    for name, shape in shapes:
        dtype, count = DTYPES[name], 1
        for size in shape:
            count *= size
        stop = start + count * dtype.itemsize
        if stop > len(frame):
            raise StageError(f"a frame of {len(frame)} bytes ends within a tensor of {shape}")
        part = frame[start:stop]
        if part.data_ptr() % dtype.itemsize:
            part = part.clone()
        tensors.append(part.view(dtype).view(shape))
        start = stop
    return plain, tensors
