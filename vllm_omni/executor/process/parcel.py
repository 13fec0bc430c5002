"""The tensors of one frame: small ones stand in the frame, large ones lie side by side in one segment, and those that
lie in a segment already stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vllm_omni.executor.process.segments import Segment, Segments, bytes_of
from vllm_omni.executor.wire.base import INLINE_BYTES
from vllm_omni.executor.wire.tensors import TensorList, entry_of, plain_bytes

ALIGNMENT = 64
MAX_LENT = 64  # segments of one frame, each of which may bring a descriptor
MAX_INLINE_BYTES = 256 * 1024  # of all tensors that stand in one frame


class Parcel(TensorList):
    """Packs the tensors of a frame, once its message is encoded."""

    def __init__(self, segments: Segments) -> None:
        super().__init__()
        self._segments = segments

    def pack(self) -> tuple[list[Any], list[tuple[Segment, Any]]]:
        """The entries of the tensors, each with its dtype and shape and its bytes, or which of the segments it lies in
        and where; and the segments: each with what must be kept until the other side has done with it, None for a
        segment of this frame alone.
        """
        entries: list[Any] = []
        lent: list[tuple[Segment, Any]] = []
        copies: list[tuple[Tensor, list[Any]]] = []
        inline_bytes = 0
        for tensor in self.tensors:
            entry = entry_of(tensor)
            found = self._segments.holding(tensor)
            if found is not None and len(lent) < MAX_LENT - 1:
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
