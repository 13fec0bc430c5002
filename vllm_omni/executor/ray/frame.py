"""One message as Ray carries it: bytes, and beside them the large tensors, each a uint8 array or an object of Ray's
store that holds one. Tensors of an accelerator pass through the CPU's memory.

What is large of one actor's message is an object that the loop hands on to another actor without looking at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from vllm_omni.executor.ray.remote_tensor import Fetch, Piece, RemoteTensor
from vllm_omni.executor.wire.base import INLINE_BYTES, MAX_ITEMS, WireError
from vllm_omni.executor.wire.codec import decode, encode
from vllm_omni.executor.wire.table import WireTypes
from vllm_omni.executor.wire.tensors import TensorList, entry_at, entry_of, opened_entry, plain_bytes, unpacked

Frame = list[Any]  # bytes, then uint8 arrays [n], or objects


def packed(message: object, types: WireTypes) -> Frame:
    """The frame of a message; WireError for what cannot be sent."""
    found = TensorList()
    body = encode(message, found.put, types)
    entries: list[list[Any]] = []
    parts: list[Any] = []
    for tensor in found.tensors:
        entry = entry_of(tensor)
        if isinstance(tensor, RemoteTensor):
            entry.append(
                [[len(parts) + index, piece.offset, piece.num_bytes] for index, piece in enumerate(tensor.pieces)]
            )
            parts += [piece.object for piece in tensor.pieces]
        elif tensor.nbytes <= INLINE_BYTES:
            entry.append(plain_bytes(tensor))
        else:
            entry += [len(parts), 0]
            parts.append(_as_bytes(tensor))
        entries.append(entry)
    return [msgpack.packb([entries, body]), *parts]


def opened(frame: Sequence[Any], types: WireTypes) -> Any:
    """The message of a frame with arrays; WireError for what is none. Its large tensors lie where the arrays do."""
    entries, body, arrays = _split(frame)
    memories = [memory_of(array) for array in arrays]
    return decode(body, lambda index: _tensor(entry_at(entries, index), memories), types)


def opened_remotely(frame: Sequence[Any], types: WireTypes, fetch: Fetch) -> Any:
    """The message of a frame with objects; its large tensors are RemoteTensors of these."""
    entries, body, objects = _split(frame)

    def tensor(index: Any) -> Tensor:
        entry = entry_at(entries, index)
        dtype, shape, rest = opened_entry(entry)
        if len(rest) == 1:
            return unpacked(entry, ())
        if type(rest[0]) is not int or not 0 <= rest[0] < len(objects) or rest[1] != 0:
            raise WireError(f"got a tensor in object {rest[0]!r:.40} of {len(objects)}, at {rest[1]!r:.40}")
        piece = Piece(objects[rest[0]], 0, math.prod(shape) * dtype.itemsize)
        return RemoteTensor([piece], shape, dtype, fetch)

    return decode(body, tensor, types)


def memory_of(array: Any) -> Callable[[], Tensor]:
    """Of an array: uint8 [n], where it lies."""
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1:
        raise WireError(f"got a {type(array).__name__} beside a message, expected uint8 [n]")
    tensor = torch.from_numpy(np.asarray(_Memory(array)))
    return lambda: tensor


def _split(frame: Sequence[Any]) -> tuple[Any, bytes, list[Any]]:
    """The entries of its tensors, the message, and what is beside it."""
    try:
        content, *parts = frame
        entries, body = msgpack.unpackb(content, max_array_len=MAX_ITEMS + 1, max_ext_len=0)
    except Exception as error:
        raise WireError(f"got a frame that is none ({type(error).__name__}: {error})") from error
    if not isinstance(body, bytes):
        raise WireError(f"got a {type(body).__name__}, expected the bytes of a message")
    return entries, body, parts


def _tensor(entry: Any, memories: Sequence[Callable[[], Tensor]]) -> Tensor:
    """One that was cut from several memories, or joined, is copied into one."""
    dtype, shape, rest = opened_entry(entry)
    if len(rest) != 1 or not isinstance(rest[0], list):
        return unpacked(entry, memories)
    pieces = [unpacked(["uint8", [num_bytes], index, offset], memories) for index, offset, num_bytes in rest[0]]
    if sum(map(len, pieces)) != math.prod(shape) * dtype.itemsize:
        raise WireError(f"got {sum(map(len, pieces))} bytes for a tensor {dtype} {shape}")
    whole = pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8), *pieces])
    return whole.view(dtype).view(shape)


def _as_bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    """uint8 [n]: its own memory where it lies in order on the CPU."""
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy()


class _Memory:
    """Of an array. The object store gives read-only ones, which torch warns of; nobody writes to what it is given."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
