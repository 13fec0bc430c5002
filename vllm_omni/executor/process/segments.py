"""Memory that several processes map: made by one of them, without a name, known to others by a descriptor alone.

There is nothing to unlink: the memory goes with the last process that maps it, however that ends.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor

from vllm_omni.executor.wire.base import WireError
from vllm_omni.utils.device import is_cpu

MIN_SEGMENT_BYTES = 64 * 1024
MAX_KEPT_BYTES = 256 * 2**20  # of segments that nobody uses, for the next tensors


def create_memory(num_bytes: int) -> int:
    """The descriptor of new memory of that size, zeroed, which cannot shrink. Where a system has no such memory, it is
    an unlinked file.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("vllm-omni", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as unlinked:
            file = os.dup(unlinked.fileno())
    try:
        os.ftruncate(file, num_bytes)
        if hasattr(os, "memfd_create"):
            import fcntl  # which only some systems have

            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(file)
        raise
    return file


class Segment:
    """Mapped memory, with the descriptor that makes it known to others; both go with this object. number: by which
    this process calls it.
    """

    def __init__(self, number: int, file: int, num_bytes: int) -> None:
        """The descriptor is its own from now on. WireError for one that is not as large as it is said to be."""
        closing = weakref.finalize(self, os.close, file)
        closing.atexit = False
        size = os.fstat(file).st_size
        if size < num_bytes or num_bytes < 1:
            raise WireError(f"got a segment of {size} bytes, expected {num_bytes}")
        self.number = number
        self.file = file
        self.num_bytes = num_bytes
        self._memory = mmap.mmap(file, num_bytes)
        self.address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    def view(self) -> memoryview:
        """The memory as an object of its own: who holds it, or a tensor of it, holds the mapping."""
        return memoryview(self._memory)


class Segments:
    """All that this process has made and mapped. Those it has made serve again when they are given back."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._known: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()  # by number
        self._by_address: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()  # by others
        self._free: list[Segment] = []

    def take(self, num_bytes: int) -> Segment:
        """A segment of at least that size, for its taker alone until `give_back`."""
        size = _rounded(num_bytes)
        for index, segment in enumerate(self._free):
            if size <= segment.num_bytes <= 2 * size:
                return self._free.pop(index)
        return self._add(Segment(next(self._numbers), create_memory(size), size))

    def give_back(self, segment: Segment) -> None:
        """Nobody reads it any more."""
        self._free.append(segment)
        while sum(each.num_bytes for each in self._free) > MAX_KEPT_BYTES:
            self._free.pop(0)

    def map(self, file: int, num_bytes: int) -> Segment:
        """Memory that another process has made."""
        segment = self._add(Segment(next(self._numbers), file, num_bytes))
        self._by_address[segment.address] = segment
        return segment

    def is_known(self, number: int) -> bool:
        """Whether it is still mapped here."""
        return number in self._known

    def holding(self, tensor: Tensor) -> Segment | None:
        """The segment of another process that a tensor lies in, whole and in order; it need not be copied then."""
        if not is_cpu(tensor.device) or not tensor.is_contiguous():
            return None
        return self._by_address.get(tensor.untyped_storage().data_ptr())

    @property
    def num_bytes(self) -> int:
        """Of all segments that are mapped here."""
        return sum(segment.num_bytes for segment in list(self._known.values()))

    def clear(self) -> None:
        """Lets go of those that nobody uses."""
        self._free.clear()

    def _add(self, segment: Segment) -> Segment:
        self._known[segment.number] = segment
        return segment


def bytes_of(segment: Segment, keep: Any = None) -> Tensor:
    """uint8 [n]: the whole memory. keep: the view that the tensor is to hold, where somebody watches for its end."""
    return torch.frombuffer(segment.view() if keep is None else keep, dtype=torch.uint8)


def _rounded(num_bytes: int) -> int:
    """Sizes in few steps, so that segments serve again; memory that nobody touches costs nothing."""
    size = MIN_SEGMENT_BYTES
    while size < num_bytes:
        size *= 2
    return size * 3 // 4 if size > MIN_SEGMENT_BYTES and num_bytes <= size * 3 // 4 else size
