"""Tensors of a GPU for other processes: handles of the CUDA driver (its IPC), which are plain numbers and bytes, and
tensors that stand for one whose content another process holds. Knows no transport.

Who gives a handle away keeps the tensor until it is told that nobody reads it any more; who gets it copies the content
at once into memory of its own.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.utils.device import current_device, device_name, raw_stream, wait_for

HANDLE_BYTES = 64
LIBRARY = "libcuda.so.1"
LAZY_PEER_ACCESS = 1  # the one flag that the driver takes


@dataclass(frozen=True, slots=True)
class DeviceHandle:
    """Where a contiguous tensor lies in an allocation of a GPU."""

    device: str  # as `device_name` says, the same in every process
    handle: bytes  # of the allocation
    num_bytes: int  # of the allocation
    offset: int  # of the tensor

    def check(self, num_bytes: int) -> None:
        """StageError unless a tensor of so many bytes can lie there."""
        is_one = len(self.handle) == HANDLE_BYTES and len(self.device) <= HANDLE_BYTES
        if not is_one or self.offset < 0 or self.offset + num_bytes > self.num_bytes:
            raise StageError(
                f"got a handle of {len(self.handle)} bytes for {num_bytes} bytes at {self.offset} of {self.num_bytes}, "
                "expected one of a tensor"
            )


class FarTensor(Tensor):
    """Shape and dtype of a tensor whose content is elsewhere. It may be passed on; what is computed of it has no
    content either.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    handle: DeviceHandle
    is_gone: Callable[[], bool]  # whether the process that holds the content is

    @classmethod
    def of(
        cls, handle: DeviceHandle, shape: Sequence[int], dtype: torch.dtype, is_gone: Callable[[], bool]
    ) -> FarTensor:
        """StageError for a handle of something else."""
        handle.check(math.prod(shape) * dtype.itemsize)
        made: FarTensor = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(cls)
        made.handle, made.is_gone = handle, is_gone
        return made

    def detach(self) -> FarTensor:
        """Itself: it has no gradient."""
        return self


class DeviceMemory(Protocol):
    """Of one device, in one process."""

    def export(self, tensor: Tensor) -> DeviceHandle | None:
        """A handle of a tensor whose content is complete; None for one that has none."""

    def copy(self, tensor: FarTensor) -> Tensor:
        """Its content, in memory of this process; StageError where it cannot be had."""


class CudaMemory:
    """By the driver: torch's own way of it keeps counts in files, which stay when a process is killed."""

    def __init__(self, device: torch.device, driver: ctypes.CDLL) -> None:
        self._device = device
        self._name = device_name(device)
        self._driver = driver

    @classmethod
    def find(cls, device: torch.device) -> CudaMemory | None:
        """None where there is no such driver: torch calls GPUs of AMD `cuda`, too."""
        try:
            driver = ctypes.CDLL(LIBRARY)
        except OSError:
            return None
        return cls(device, driver)

    def export(self, tensor: Tensor) -> DeviceHandle | None:
        if tensor.device != self._device and device_name(tensor.device) != self._name:
            return None
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            return None
        with current_device(self._device):
            wait_for(self._device)
            found = self._allocation(tensor.data_ptr())
            if found is None:
                return None
            base, size = found
            handle = _Handle()
            # refused for memory of growing segments and of asynchronous allocators
            if self._driver.cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(base)):
                return None
        return DeviceHandle(self._name, bytes(handle.content), size, tensor.data_ptr() - base)

    def copy(self, tensor: FarTensor) -> Tensor:
        told = tensor.handle
        if told.device != self._name:
            raise StageError(f"got a tensor of the GPU {told.device}, expected one of {self._name}")
        with current_device(self._device):
            target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            opened = ctypes.c_uint64()
            flags = ctypes.c_uint(LAZY_PEER_ACCESS)
            self._check(
                self._driver.cuIpcOpenMemHandle_v2(ctypes.byref(opened), _Handle.from_buffer_copy(told.handle), flags)
            )
            try:
                found = self._allocation(opened.value)
                if found is not None and found[1] < told.offset + target.nbytes:
                    raise StageError(
                        f"got an allocation of {found[1]} bytes, expected the {told.num_bytes} it was said"
                    )
                source, stream = opened.value + told.offset, raw_stream(self._device)
                addresses = (ctypes.c_uint64(target.data_ptr()), ctypes.c_uint64(source))
                length, where = ctypes.c_size_t(target.nbytes), ctypes.c_void_p(stream)
                self._check(self._driver.cuMemcpyDtoDAsync_v2(*addresses, length, where))
                wait_for(self._device)
            finally:
                self._driver.cuIpcCloseMemHandle(opened)
        return target

    def _allocation(self, address: int) -> tuple[int, int] | None:
        """Where the allocation of an address begins, and its bytes."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        pointers = (ctypes.byref(base), ctypes.byref(size))
        if self._driver.cuMemGetAddressRange_v2(*pointers, ctypes.c_uint64(address)):
            return None
        return base.value, size.value

    def _check(self, code: int) -> None:
        if code:
            raise StageError(
                f"got error {code} of the CUDA driver for a tensor of another process, expected its content; if that"
                " process still runs, its memory cannot be opened here: run both stages in one process"
            )


class _Handle(ctypes.Structure):
    _fields_: ClassVar[Any] = [("content", ctypes.c_ubyte * HANDLE_BYTES)]
