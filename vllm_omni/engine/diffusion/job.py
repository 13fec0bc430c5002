"""One request in the diffusion stage: what of it is on its way and what is finished. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_omni.engine.base import ReadPorts
from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.messages import StageTask
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import StageSignature, StreamChunk, TensorSpec
from vllm_omni.worker.diffusion.diffusion_runner import DiffusionState

if TYPE_CHECKING:
    from vllm_omni.engine.diffusion.saved_job import SavedJob


@dataclass(slots=True)
class DiffusionJob:
    """A task in parts: one per output or, where its input comes in chunks, one per chunk of the only output."""

    task: StageTask
    params: DiffusionParams
    seed: int
    inputs: Mapping[str, Any]  # what the model prepares: ports without the streamed one, and the request's fields
    is_heavy: bool  # whether the preparation encodes media
    is_complete: bool  # no chunk follows those that were accepted
    is_prepared: bool = False
    prepared: Any = None  # what the model made of its inputs
    is_chunked: bool = False  # there is more than one chunk
    is_paused: bool = False  # no chunk begins; those on their way are finished
    lacks_adapters: bool = False  # nothing begins until they are loaded
    num_parts: int = 0  # begun so far
    num_steps: int = 0  # of finished parts
    num_reused: int = 0
    running: dict[int, DiffusionState] = field(default_factory=dict)  # parts on their way, by number
    outputs: dict[int, Tensor] = field(default_factory=dict)  # what is kept of finished parts
    latents: dict[int, Tensor] = field(default_factory=dict)
    previews: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # by step and part, until all parts are there
    saved: SavedJob | None = None  # where it goes on from; None for one that begins
    num_resumed: int = 0  # steps that were done before it was saved

    @property
    def request_id(self) -> str:
        return self.task.request_id

    @property
    def is_held(self) -> bool:
        """Whether nothing of it begins."""
        return self.is_paused or self.lacks_adapters

    @property
    def num_outputs(self) -> int:
        return self.params.num_outputs or 1

    @property
    def is_done(self) -> bool:
        return self.is_complete and self.is_prepared and not self.running

    def accept(self, port: str, chunk: object) -> StreamChunk:
        """The next chunk, checked as far as the parts depend on it: that the rows follow one another is the router's
        to see.
        """
        if not isinstance(chunk, StreamChunk):
            raise StageError(f"{port}: got {type(chunk).__name__}, expected a StreamChunk")
        if self.is_complete:
            raise StageError(f"{port}: got a chunk from {chunk.start} on, expected none after the last one")
        if not 0 <= chunk.num_before <= chunk.start or chunk.num_after < 0 or chunk.stop < chunk.start:
            raise StageError(
                f"{port}: got the rows {chunk.start} to {chunk.stop} with {chunk.num_before} before and"
                f" {chunk.num_after} behind them, expected at least 0 of each and all of them in the port"
            )
        if not chunk.is_last and self.num_outputs > 1:
            raise InvalidRequestError(
                f"num_outputs: got {self.num_outputs}, expected 1 where {port!r} is streamed; leave it out"
            )
        self.is_chunked = self.is_chunked or not chunk.is_last
        self.is_complete = chunk.is_last
        return chunk

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

    def progress(self) -> tuple[int, int]:
        """(steps done, steps known of), of all outputs or of all chunks that have begun."""
        states = self.running.values()
        return (
            self.num_steps + sum(state.step for state in states),
            self.num_steps + sum(state.num_steps for state in states),
        )

    def collect(self, state: DiffusionState, preview: Tensor) -> Tensor | None:
        """Keeps a preview [H, W, 3] until those of all outputs after this step are there: then [N, H, W, 3]."""
        found = self.previews.setdefault(state.step, {})
        found[state.index] = preview
        if len(found) < self.num_outputs:
            return None
        del self.previews[state.step]
        return torch.stack([found[index] for index in range(self.num_outputs)])

    def counts(self) -> dict[str, int]:
        """What a caller is told of the work, of all outputs; `resumed_steps` of these were done before it was saved."""
        resumed = {} if self.saved is None else {"resumed_steps": self.num_resumed}
        return {"steps": self.num_steps, "cache_hits": self.num_reused, **resumed}

    def tensors(self, output_port: str, reads: ReadPorts, signature: StageSignature) -> dict[str, Tensor]:
        """[outputs, ...] by port, of those that somebody reads; chunks are put together along a dimension of the
        output. signature: what outputs of a port look like where the input had no row, and nothing was made of it.
        """
        found = {}
        if not self.num_parts:
            specs = {port: signature.outputs[port] for port in (output_port, "latents") if port in reads.whole}
            return {
                port: torch.zeros(self.num_outputs, *spec.row_shape)
                for port, spec in specs.items()
                if isinstance(spec, TensorSpec)
            }
        if output_port in reads.whole and self.outputs:
            found[output_port] = self._joined(self.outputs, dim=1)
        if "latents" in reads.whole:
            found["latents"] = self._joined(self.latents, dim=0)
        return found

    def finished_outputs(self, output_port: str) -> dict[str, Tensor]:
        """[outputs, ...] of the outputs, or of the beginning of the one output, that are finished and kept."""
        return {output_port: self._joined(self.outputs, dim=1)} if self.outputs else {}

    def _joined(self, parts: Mapping[int, Tensor], dim: int) -> Tensor:
        ordered = [parts[index] for index in sorted(parts)]
        return torch.cat(ordered, dim=dim)[None] if self.is_chunked else torch.stack(ordered)
