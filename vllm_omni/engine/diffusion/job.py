"""One request in the diffusion stage: what of it is on its way and what is finished. Runs nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_omni.engine.base import StageTask
from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StreamChunk
from vllm_omni.worker.diffusion.diffusion_runner import DiffusionState


@dataclass(slots=True)
class DiffusionJob:
    """A task in parts: one per output or, where its input comes in chunks, one per chunk of the only output.

    prepared: what the model made of its inputs. is_decoded: whether somebody reads the decoded result. is_complete:
    no chunk follows any more. is_chunked: there is more than one. next_start: where it must start. waiting: chunks
    that are here and not begun. running: the parts on their way, by number; outputs, latents: what is kept of finished
    ones.
    """

    task: StageTask
    params: DiffusionParams
    seed: int
    prepared: Any
    is_decoded: bool
    is_complete: bool
    is_chunked: bool = False
    is_paused: bool = False
    next_start: int = 0
    num_parts: int = 0
    num_steps: int = 0
    num_reused: int = 0
    waiting: deque[StreamChunk] = field(default_factory=deque)
    running: dict[int, DiffusionState] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)

    @property
    def request_id(self) -> str:
        return self.task.request_id

    @property
    def num_outputs(self) -> int:
        return self.params.num_outputs or 1

    @property
    def is_done(self) -> bool:
        return self.is_complete and not self.waiting and not self.running

    def take(self, port: str, chunk: object) -> None:
        """Queues the next chunk; StageError unless it continues the one before it."""
        if not isinstance(chunk, StreamChunk):
            raise StageError(f"{port}: got {type(chunk).__name__}, expected a StreamChunk")
        if self.is_complete:
            raise StageError(f"{port}: got a chunk from {chunk.start} on, expected none after the last one")
        is_whole = 0 <= chunk.num_before <= chunk.start and chunk.num_after >= 0 and chunk.stop >= chunk.start
        if chunk.start != self.next_start or not is_whole:
            raise StageError(
                f"{port}: got the rows {chunk.start} to {chunk.stop} with {chunk.num_before} before and"
                f" {chunk.num_after} behind them, expected a chunk from {self.next_start} on"
            )
        if not chunk.is_last and self.num_outputs > 1:
            raise InvalidRequestError(
                f"num_outputs: got {self.num_outputs}, expected 1 where {port!r} is streamed; leave it out"
            )
        if chunk.is_last and chunk.stop == 0:
            raise StageError(f"{port}: got no rows at all, expected at least one; the stage before made nothing")
        self.is_chunked = self.is_chunked or not chunk.is_last
        self.next_start, self.is_complete = chunk.stop, chunk.is_last
        self.waiting.append(chunk)

    def begin(self, state: DiffusionState) -> None:
        self.running[state.index] = state
        self.num_parts += 1

    def end(self, state: DiffusionState, output: Tensor | None, keeps_latents: bool) -> None:
        """Puts a finished part away and lets go of its state. output: None where nobody reads it later."""
        del self.running[state.index]
        self.num_steps += state.step
        self.num_reused += state.num_reused
        if output is not None:
            self.outputs[state.index] = output
        if keeps_latents:
            self.latents[state.index] = state.latents[state.trajectory.kept]

    def progress(self, state: DiffusionState) -> tuple[int, int]:
        """(steps done, steps known of): of this output, or of all chunks up to this one."""
        before = state.index * state.num_steps if self.is_chunked else 0
        return before + state.step, before + state.num_steps

    def joined(self, parts: Mapping[int, Tensor], dim: int) -> Tensor:
        """[outputs, ...]; chunks are put together along a dimension of the output."""
        ordered = [parts[index] for index in range(self.num_parts)]
        return torch.cat(ordered, dim=dim)[None] if self.is_chunked else torch.stack(ordered)
