"""A message to bytes and back; what that means, and who carries the tensors, says the package."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, cast

import msgpack
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllm_omni.executor.wire import errors, media
from vllm_omni.executor.wire.base import INLINE_BYTES, MAX_DEPTH, MAX_FRAME_BYTES, MAX_ITEMS, Tag, WireError
from vllm_omni.executor.wire.reader import Get, Reader
from vllm_omni.executor.wire.table import WireTypes

Put = Callable[[Tensor], Any]
PLAIN = (type(None), bool, float)
LEAST_INT, MOST_INT = -(2**63), 2**64 - 1
MIN_PACKED = 16  # integers of a list that are worth packing


def encode(message: object, put: Put, types: WireTypes) -> bytes:
    """The bytes of a message. put: is given each tensor, and returns the plain value that stands for it. WireError,
    which says where, for what cannot be sent.
    """
    body: bytes = msgpack.packb(_Writer(put, types).plain(message, 0), unicode_errors="surrogatepass")
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"got a message of {len(body)} bytes, expected at most {MAX_FRAME_BYTES} beside its tensors")
    return body


def decode(body: bytes | memoryview, get: Get, types: WireTypes) -> Any:
    """The message that `encode` wrote; WireError, in memory that the length of `body` bounds, for anything else. get:
    what `put` had returned -> the tensor.
    """
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"got a message of {len(body)} bytes, expected at most {MAX_FRAME_BYTES}")
    try:
        plain = msgpack.unpackb(
            body, unicode_errors="surrogatepass", max_array_len=MAX_ITEMS + 1, max_ext_len=0, strict_map_key=True
        )
    except Exception as error:  # the library raises half a dozen kinds
        raise WireError(f"got {len(body)} bytes that are no message ({type(error).__name__}: {error})") from error
    try:
        return Reader(get, types).value(plain, 0)
    except WireError:
        raise
    except Exception as error:  # a constructor that refuses what it is given, an index out of range
        raise WireError(f"got a message that does not fit its types ({type(error).__name__}: {error})") from error


class _Writer:
    """Turns values into what msgpack knows: None, numbers, strings, bytes, maps, and arrays that begin with a Tag."""

    def __init__(self, put: Put, types: WireTypes) -> None:
        self._put = put
        self._types = types

    def plain(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise WireError(f"got a value of more than {MAX_DEPTH} levels, which cannot be sent to another process")
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind is int:
            return value if LEAST_INT <= value <= MOST_INT else [Tag.BIG_INTEGER, f"{value:x}"]
        if kind is str:
            return value
        if isinstance(value, enum.Enum) and not isinstance(value, enum.Flag):
            return [Tag.CHOICE, self._types.name(kind), value.value]
        if dataclasses.is_dataclass(kind):
            return self._record(value, depth)
        if isinstance(value, bytes | bytearray | memoryview):
            return self._bytes(bytes(value))
        return self._collection(value, depth)

    def _collection(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, set | frozenset):
            return self._items(Tag.SET if isinstance(value, set) else Tag.FROZENSET, list(value), depth)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, tuple | list):
            return self._items(Tag.TUPLE if isinstance(value, tuple) else Tag.LIST, value, depth)
        return self._foreign(value, depth)

    def _foreign(self, value: Any, depth: int) -> Any:
        """Values of other libraries."""
        if isinstance(value, Tensor):
            return [Tag.TENSOR, self._put(value.detach())]
        if isinstance(value, np.ndarray):
            return media.plain_array(value, self._bytes)
        if isinstance(value, np.generic):
            return media.plain_scalar(value)
        if isinstance(value, Image.Image):
            return media.plain_picture(value, self._bytes)
        if isinstance(value, PurePath):
            return [Tag.PATH, str(value)]
        if isinstance(value, torch.dtype | torch.device):
            tag = Tag.DTYPE if isinstance(value, torch.dtype) else Tag.DEVICE
            return [tag, str(value).removeprefix("torch.")]
        if isinstance(value, BaseException):
            return [Tag.ERROR, *errors.plain_error(value, lambda each: self.plain(each, depth + 1))]
        if isinstance(value, int):
            return self.plain(int(value), depth)
        if isinstance(value, Sequence):
            return self._items(Tag.LIST, list(value), depth)
        kind = type(value)
        raise WireError(
            f"got a {kind.__module__}.{kind.__qualname__}, which cannot be sent to another process; expected plain"
            " values, tensors, arrays, pictures, bytes or paths"
        )

    def _record(self, value: Any, depth: int) -> list[Any]:
        """A field that has its default is left out."""
        kind = type(value)
        name, fields = self._types.name(kind), {}
        for key, default in _fields(cast(Hashable, kind)):
            item = getattr(value, key)
            if item is default:
                continue
            try:
                fields[key] = self.plain(item, depth + 1)
            except WireError as error:
                raise WireError(f"{key}: {error}") from None
        return [Tag.RECORD, name, fields]

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        if all(type(key) is str for key in value):
            return {key: self.plain(item, depth + 1) for key, item in value.items()}
        return self._items(Tag.DICT, [each for pair in value.items() for each in pair], depth)

    def _items(self, tag: Tag, items: Sequence[Any], depth: int) -> list[Any]:
        if tag in (Tag.LIST, Tag.TUPLE) and len(items) >= MIN_PACKED and all(type(item) is int for item in items):
            packed = _packed(items)
            if packed is not None:
                return [Tag.INTEGERS, tag, self._bytes(packed)]
        if len(items) <= MAX_ITEMS:
            return [tag, *(self.plain(item, depth + 1) for item in items)]
        pieces = [items[start : start + MAX_ITEMS] for start in range(0, len(items), MAX_ITEMS)]
        return [Tag.LONG, tag, *(self._items(Tag.LIST, piece, depth + 1) for piece in pieces)]

    def _bytes(self, value: bytes) -> Any:
        if len(value) <= INLINE_BYTES:
            return value
        return [Tag.BYTES, self._put(torch.frombuffer(bytearray(value), dtype=torch.uint8))]


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Name and default of each field of a dataclass; MISSING where it has none."""
    return tuple((field.name, field.default) for field in dataclasses.fields(kind))


def _packed(items: Sequence[int]) -> bytes | None:
    try:
        return np.array(items, dtype="<i8").tobytes()
    except OverflowError:
        return None
