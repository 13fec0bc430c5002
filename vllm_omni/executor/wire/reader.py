"""What msgpack has read, back into the values that were sent. Trusts nothing: every tag, name and length is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_omni.executor.wire import errors, media
from vllm_omni.executor.wire.base import MAX_DEPTH, Tag, WireError
from vllm_omni.executor.wire.table import WireTypes
from vllm_omni.utils.checks import brief

Get = Callable[[Any], Tensor]
MAX_DIGITS = 1_100  # hexadecimal ones, of an integer
COLLECTIONS: dict[Tag, Callable[[list[Any]], Any]] = {
    Tag.LIST: list,
    Tag.TUPLE: tuple,
    Tag.SET: set,
    Tag.FROZENSET: frozenset,
    Tag.DICT: lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}


class Reader:
    """Of one message. What is wrong with it is a WireError, or whatever a constructor raises of it."""

    def __init__(self, get: Get, types: WireTypes) -> None:
        self._get = get
        self._types = types

    def value(self, plain: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise WireError(f"got a message of more than {MAX_DEPTH} levels")
        if isinstance(plain, dict):
            return {_key(key): self.value(item, depth + 1) for key, item in plain.items()}
        if not isinstance(plain, list):
            if plain is None or isinstance(plain, bool | int | float | str | bytes):
                return plain
            raise WireError(f"got a message that holds a {type(plain).__name__}")
        tag, rest = _tag(plain), plain[1:]
        if tag in COLLECTIONS:
            return COLLECTIONS[tag]([self.value(item, depth + 1) for item in rest])
        return _READERS[tag](self, depth, *rest)

    def _long(self, depth: int, tag: Any, *pieces: Any) -> Any:
        items: list[Any] = []
        for piece in pieces:
            found = self.value(piece, depth + 1)
            if not isinstance(found, list):
                raise WireError(f"got a {type(found).__name__} as a piece of a list")
            items += found
        return COLLECTIONS[Tag(tag)](items)

    def _integers(self, depth: int, tag: Any, packed: Any) -> Any:
        return COLLECTIONS[Tag(tag)](np.frombuffer(self._bytes(packed), dtype="<i8").tolist())

    def _big_integer(self, depth: int, digits: Any) -> int:
        if not isinstance(digits, str) or len(digits) > MAX_DIGITS:
            raise WireError(f"got the digits {brief(digits)}, expected a string of at most {MAX_DIGITS}")
        return int(digits, 16)

    def _large_bytes(self, depth: int, reference: Any) -> bytes:
        tensor = self._get(reference)
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise WireError(f"got {tensor.dtype} {list(tensor.shape)} for bytes, expected uint8 of one dimension")
        return tensor.numpy().tobytes()

    def _tensor(self, depth: int, reference: Any) -> Tensor:
        return self._get(reference)

    def _array(self, depth: int, dtype: Any, shape: Any, content: Any) -> Any:
        return media.read_array(dtype, self.value(shape, depth + 1), self._bytes(content))

    def _scalar(self, depth: int, dtype: Any, content: Any) -> Any:
        return media.read_scalar(dtype, self._bytes(content))

    def _picture(self, depth: int, mode: Any, width: Any, height: Any, content: Any, palette: Any, notes: Any) -> Any:
        pixels = self._bytes(content)
        return media.read_picture(
            mode, width, height, pixels, self.value(palette, depth + 1), self.value(notes, depth + 1)
        )

    def _path(self, depth: int, path: Any) -> Path:
        return Path(path)

    def _dtype(self, depth: int, name: Any) -> torch.dtype:
        found = getattr(torch, name) if isinstance(name, str) else None
        if not isinstance(found, torch.dtype):
            raise WireError(f"got the dtype {brief(name)}, which torch does not have")
        return found

    def _device(self, depth: int, name: Any) -> torch.device:
        return torch.device(name)

    def _choice(self, depth: int, name: Any, value: Any) -> Any:
        return self._types.find(name)(value)

    def _record(self, depth: int, name: Any, fields: Any) -> Any:
        kind, given = self._types.find(name), self.value(fields, depth + 1)
        try:
            return kind(**given)
        except WireError:
            raise
        except Exception as error:  # what a constructor refuses, or what is no set of fields
            raise WireError(f"got a {name} that is none ({type(error).__name__}: {error})") from error

    def _error(self, depth: int, *fields: Any) -> BaseException:
        return errors.read_error(*(self.value(field, depth + 1) for field in fields))

    def _bytes(self, plain: Any) -> bytes:
        if isinstance(plain, bytes):
            return plain
        if isinstance(plain, list) and len(plain) == 2 and _tag(plain) is Tag.BYTES:
            return self._large_bytes(0, plain[1])
        raise WireError(f"got a {type(plain).__name__}, expected bytes")


_READERS: dict[Tag, Callable[..., Any]] = {
    Tag.LONG: Reader._long,
    Tag.INTEGERS: Reader._integers,
    Tag.BIG_INTEGER: Reader._big_integer,
    Tag.BYTES: Reader._large_bytes,
    Tag.TENSOR: Reader._tensor,
    Tag.ARRAY: Reader._array,
    Tag.SCALAR: Reader._scalar,
    Tag.PICTURE: Reader._picture,
    Tag.PATH: Reader._path,
    Tag.DTYPE: Reader._dtype,
    Tag.DEVICE: Reader._device,
    Tag.CHOICE: Reader._choice,
    Tag.RECORD: Reader._record,
    Tag.ERROR: Reader._error,
}


def _tag(plain: list[Any]) -> Tag:
    if not plain or type(plain[0]) is not int or plain[0] not in Tag._value2member_map_:
        raise WireError(f"got a value of the unknown type {brief(plain[0]) if plain else 'of an empty list'}")
    return Tag(plain[0])


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise WireError(f"got the key {brief(key)}, expected a string")
    return key
