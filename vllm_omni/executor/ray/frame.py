"""One message as Ray carries it: bytes, and beside them the large tensors as uint8 arrays, which Ray keeps in its
object store and maps without a copy on the machine that reads them. Tensors of an accelerator pass through the CPU's
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from vllm_omni.executor.wire.base import INLINE_BYTES, MAX_ITEMS, WireError
from vllm_omni.executor.wire.codec import decode, encode
from vllm_omni.executor.wire.table import WireTypes
from vllm_omni.executor.wire.tensors import TensorList, entry_at, entry_of, plain_bytes, unpacked

Frame = list[Any]  # bytes, then uint8 arrays [n]


def packed(message: object, types: WireTypes) -> Frame:
    """The frame of a message; WireError for what cannot be sent."""
    found = TensorList()
    body = encode(message, found.put, types)
    entries: list[list[Any]] = []
    arrays: list[np.ndarray[Any, Any]] = []
    for tensor in found.tensors:
        entry = entry_of(tensor)
        if tensor.nbytes <= INLINE_BYTES:
            entry.append(plain_bytes(tensor))
        else:
            entry += [len(arrays), 0]
            arrays.append(_as_bytes(tensor))
        entries.append(entry)
    return [msgpack.packb([entries, body]), *arrays]


def opened(frame: Sequence[Any], types: WireTypes) -> Any:
    """The message of a frame; WireError for what is none. Its large tensors lie where the arrays do."""
    try:
        content, *arrays = frame
        entries, body = msgpack.unpackb(content, max_array_len=MAX_ITEMS + 1, max_ext_len=0)
        memories: list[Callable[[], Tensor]] = [_memory(array) for array in arrays]
        if not isinstance(body, bytes):
            raise WireError(f"got a {type(body).__name__}, expected the bytes of a message")
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"got a frame that is none ({type(error).__name__}: {error})") from error
    return decode(body, lambda index: unpacked(entry_at(entries, index), memories), types)


def _as_bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    """uint8 [n]: its own memory where it lies in order on the CPU."""
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy()


def _memory(array: Any) -> Callable[[], Tensor]:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1:
        raise WireError(f"got a {type(array).__name__} beside a message, expected uint8 [n]")
    tensor = torch.from_numpy(np.asarray(_Memory(array)))
    return lambda: tensor


class _Memory:
    """Of an array. The object store gives read-only ones, which torch warns of; nobody writes to what it is given."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
