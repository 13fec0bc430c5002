"""A tensor whose content is in Ray's object store, perhaps on another machine: shape and dtype are known, the content
is fetched by whoever computes with it. Rows can be cut and joined without that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Fetch = Callable[[Any], Tensor]  # an object -> its bytes, uint8 [n]; DataLostError where it is gone
ops = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of one object."""

    object: Any  # as Ray refers to it
    offset: int
    num_bytes: int


class RemoteTensor(Tensor):
    """On the CPU, in order. pieces: what its bytes are, one after another."""

    pieces: tuple[Piece, ...]
    fetch: Fetch

    @staticmethod
    def __new__(cls, pieces: Sequence[Piece], shape: Sequence[int], dtype: torch.dtype, fetch: Fetch) -> RemoteTensor:
        made: RemoteTensor = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        made.pieces, made.fetch = tuple(pieces), fetch
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RemoteTensor({list(self.shape)}, {self.dtype}, {len(self.pieces)} pieces)"

    def here(self) -> Tensor:
        """The same with its content, which is fetched now."""
        found = [self.fetch(piece.object)[piece.offset : piece.offset + piece.num_bytes] for piece in self.pieces]
        if not found:
            return torch.empty(self.shape, dtype=self.dtype)
        return (found[0] if len(found) == 1 else torch.cat(found)).view(self.dtype).view(self.shape)

    def numpy(self, *, force: bool = False) -> Any:
        return self.here().numpy(force=force)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is ops.detach.default:
            return _like(args[0], args[0].pieces, len(args[0]) if args[0].dim() else 0)
        if func is ops.slice.Tensor and (len(args) < 2 or args[1] == 0) and len(args) < 5:
            return _rows(args[0], *args[2:])
        if func is ops.new_empty.default:  # of which the content does not matter
            return torch.empty(args[1], dtype=(kwargs or {}).get("dtype") or args[0].dtype)
        if func is ops.cat.default and len(args) == 1 and all(isinstance(each, RemoteTensor) for each in args[0]):
            first = args[0][0]
            return _like(first, [piece for each in args[0] for piece in each.pieces], sum(map(len, args[0])))
        plain_args, plain_kwargs = tree_map(content_of, (tuple(args), dict(kwargs or {})))
        return func(*plain_args, **plain_kwargs)


def content_of(value: Any) -> Any:
    """The same, but a RemoteTensor with its content."""
    return value.here() if isinstance(value, RemoteTensor) else value


def _like(tensor: RemoteTensor, pieces: Sequence[Piece], num_rows: int) -> RemoteTensor:
    shape = (num_rows, *tensor.shape[1:]) if tensor.dim() else ()
    return RemoteTensor(pieces, shape, tensor.dtype, tensor.fetch)


def _rows(tensor: RemoteTensor, start: int | None = None, stop: int | None = None) -> RemoteTensor:
    begin, end, _ = slice(start, stop).indices(len(tensor))
    num_rows = max(end - begin, 0)
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    low, high = begin * row_bytes, (begin + num_rows) * row_bytes
    pieces, at = [], 0
    for piece in tensor.pieces:
        first, last = max(low - at, 0), min(high - at, piece.num_bytes)
        if first < last:
            pieces.append(Piece(piece.object, piece.offset + first, last - first))
        at += piece.num_bytes
    return _like(tensor, pieces, num_rows)
