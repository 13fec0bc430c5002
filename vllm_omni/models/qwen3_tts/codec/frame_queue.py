"""Frames of one streamed port of a request that wait to be decoded. Checks them; runs nothing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.payload import StreamChunk


@dataclass(slots=True)
class FrameQueue:
    """Each frame is consumed once."""

    port: str
    codebook_size: int
    num_codebooks: int
    is_complete: bool = False  # no chunk follows those that were accepted
    chunks: deque[Tensor] = field(default_factory=deque)  # [n, Q] frames that wait; empty ones too

    def __len__(self) -> int:
        """Frames that wait."""
        return sum(map(len, self.chunks))

    @property
    def is_done(self) -> bool:
        return self.is_complete and not self.chunks

    def accept(self, chunk: object) -> None:
        """Checks what embedding tables would fall over, or answer with another codebook's rows."""
        port = self.port
        if not isinstance(chunk, StreamChunk):
            raise StageError(f"{port}: got {type(chunk).__name__}, expected a StreamChunk")
        if self.is_complete:
            raise StageError(f"{port}: got a chunk from {chunk.start} on, expected none after the last one")
        codes, shape = chunk.new_rows, f"[n, {self.num_codebooks}]"
        is_integer = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
        if codes.dim() != 2 or codes.shape[1] != self.num_codebooks or not is_integer:
            raise StageError(f"{port}: got {codes.dtype} {list(codes.shape)}, expected integers {shape}")
        if len(codes):
            low, high = (int(value) for value in codes.aminmax())
            if low < 0 or high >= self.codebook_size:
                raise StageError(f"{port}: got values from {low} to {high}, expected 0 to {self.codebook_size - 1}")
        self.is_complete = chunk.is_last
        self.chunks.append(codes)

    def next(self, most: int) -> Tensor:
        """[n, Q] int64 of what waits, n at most `most`; they stay until `consume`."""
        found, room = [], most
        for chunk in self.chunks:
            found.append(chunk[:room])
            room -= len(found[-1])
            if not room:
                break
        return torch.cat(found).to(torch.int64)

    def consume(self, num_frames: int) -> int:
        """Lets go of frames that were decoded, and of empty chunks behind them -> how many chunks are used up."""
        num_chunks, left = 0, num_frames
        while self.chunks and len(self.chunks[0]) <= left:
            left -= len(self.chunks.popleft())
            num_chunks += 1
        if left:
            self.chunks[0] = self.chunks[0][left:]
        return num_chunks
