"""The tensors of one frame: small ones stand in the frame, large ones lie side by side in one segment, and those that
lie in a segment already stay there, as do those that stay on their device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vllm_omni.executor.process.segments import Segment, Segments, bytes_of
from vllm_omni.executor.wire.base import INLINE_BYTES, WireError
from vllm_omni.executor.wire.tensors import TensorList, entry_of, plain_bytes
from vllm_omni.utils.device_memory import DeviceHandle, FarTensor

Export = Callable[[Tensor], DeviceHandle | None]
ALIGNMENT = 64
MAX_LENT = 64  # segments of one frame, each of which may bring a descriptor
MAX_INLINE_BYTES = 256 * 1024  # of all tensors that stand in one frame


class Parcel(TensorList):
    """Packs the tensors of a frame, once its message is encoded. export: gives handles of tensors that stay on their
    device, None for those that do not.
    """

    def __init__(self, segments: Segments, export: Export) -> None:
        super().__init__()
        self._segments = segments
        self._export = export
        self.far: list[tuple[list[Any], Tensor]] = []  # entries without a number yet, and what must be kept for them

    def pack(self) -> tuple[list[Any], list[tuple[Segment, Any]]]:
        """The entries of the tensors, each with its dtype and shape and its bytes, or which of the segments it lies in
        and where, or its handle (see `far`); and the segments: each with what must be kept until the other side has
        done with it, None for a segment of this frame alone.
        """
        entries: list[Any] = []
        lent: list[tuple[Segment, Any]] = []
        copies: list[tuple[Tensor, list[Any]]] = []
        inline_bytes = 0
        for tensor in self.tensors:
            entry = entry_of(tensor)
            handle = self._handle_of(tensor)
            found = None if handle is not None else self._segments.holding(tensor)
            if handle is not None:
                entry += [handle.device, handle.handle, handle.num_bytes, handle.offset]
                self.far.append((entry, tensor))
            elif found is not None and len(lent) < MAX_LENT - 1:
                lent.append((found, tensor))
                entry += [len(lent) - 1, tensor.data_ptr() - found.address]
            elif tensor.nbytes <= INLINE_BYTES and inline_bytes + tensor.nbytes <= MAX_INLINE_BYTES:
                inline_bytes += tensor.nbytes
                entry.append(plain_bytes(tensor))
            else:
                copies.append((tensor, entry))
            entries.append(entry)
        if copies:
            lent.append((self._copied(copies, len(lent)), None))
        return entries, lent

    def _handle_of(self, tensor: Tensor) -> DeviceHandle | None:
        if not isinstance(tensor, FarTensor):
            return self._export(tensor)
        if tensor.is_gone():
            raise WireError("got a tensor that was lost with the process that held it; send the request again")
        return tensor.handle

    def _copied(self, copies: Sequence[tuple[Tensor, list[Any]]], index: int) -> Segment:
        """One segment that holds them all: the one copy on their way."""
        offsets, end = [], 0
        for tensor, _ in copies:
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        segment = self._segments.take(end)
        memory = bytes_of(segment)
        for (tensor, entry), offset in zip(copies, offsets, strict=True):
            memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            entry += [index, offset]
        return segment
