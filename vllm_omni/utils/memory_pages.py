"""What the system is told of pages of memory. Where it cannot be told, all works without."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

from vllm_omni.utils.device import is_cpu

HUGE_PAGE = 2**21  # bytes, on x86-64 and mostly on ARM


def give_back(address: int, num_bytes: int) -> None:
    """Lets the system have the whole pages between two places of a mapped file, of which nothing is needed any more;
    reading them again would read the file. Otherwise they stay until the file is closed.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    _advise(first, (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE, "MADV_DONTNEED")


def in_huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, new and not yet written: on a CPU its memory comes in pages of 2 MiB if the system has them.
    What is read from end to end at each step is read faster so: an address is looked up once where it would be 512
    times.
    """
    num_bytes = tensor.untyped_storage().nbytes()
    if is_cpu(tensor.device) and num_bytes >= HUGE_PAGE:
        first = tensor.untyped_storage().data_ptr()
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(start, -(-(first + num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE, "MADV_HUGEPAGE")
    return tensor


def _advise(start: int, stop: int, advice: str) -> None:
    """start, stop: addresses of pages."""
    if sys.platform == "linux" and start < stop and hasattr(mmap, advice):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), getattr(mmap, advice))
