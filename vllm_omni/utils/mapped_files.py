"""Memory of files that are mapped."""

from __future__ import annotations

import ctypes
import mmap
import sys


def give_back(address: int, num_bytes: int) -> None:
    """Lets the system have the whole pages between two places of a mapped file, of which nothing is needed any more;
    reading them again would read the file. Where the system cannot be told, they stay until the file is closed.
    """
    if sys.platform != "linux":
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < stop:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_DONTNEED)
