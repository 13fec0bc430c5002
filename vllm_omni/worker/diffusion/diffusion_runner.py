"""Runs one denoising step for a batch of diffusion states: model rows, step caches, sampler; then decodes, piece by
piece. Owns the step caches' memory.

Every state is its own: latents, trajectory and caches are shared with nobody. `predict` changes nothing but caches,
so a batch that failed can be tried again row by row; `advance` commits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_omni.core.diffusion.caches.base import StepCache
from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.errors import StageError
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, TokenBatch, Trajectory


@dataclass(slots=True)
class DiffusionState:
    """One output, or one chunk of it, on its way. step: how many are done. num_reused: rows of steps that a step cache
    served. pieces: what is decoded, `decoder` gives the rest.
    """

    request_id: str
    index: int
    params: DiffusionParams
    trajectory: Trajectory
    latents: Tensor
    step: int = 0
    num_reused: int = 0
    pieces: list[Tensor] = field(default_factory=list)
    decoder: Iterator[Tensor] | None = None

    @property
    def key(self) -> str:
        return f"{self.request_id}/{self.index}"

    @property
    def num_steps(self) -> int:
        return len(self.trajectory.sampler.timesteps)

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps

    @property
    def timestep(self) -> float:
        return float(self.trajectory.sampler.timesteps[self.step])


@dataclass(frozen=True, slots=True)
class Row:
    """One branch of one state: one row of the model's batch."""

    state: DiffusionState
    branch: str

    @property
    def cache_key(self) -> tuple[str, int, str]:
        return (self.state.request_id, self.state.index, self.branch)


class DiffusionRunner:
    """`cache_type` and `threshold` make the step cache of every row; `caches` is their budget."""

    def __init__(
        self, model: DiffusionModel, cache_type: type[StepCache], threshold: float | None, caches: DiTCacheManager
    ) -> None:
        self.model = model
        self.caches = caches
        self._cache_type = cache_type
        self._threshold = threshold

    @torch.inference_mode()
    def predict(self, states: Sequence[DiffusionState]) -> list[list[Tensor]]:
        """For each state the outputs of the branches that act now, in their order, each shaped as its latents."""
        rows = [Row(state, branch) for state in states for branch in state.trajectory.branches(state.timestep)]
        tokens = self.model.begin(
            [row.state.latents for row in rows],
            [row.state.timestep for row in rows],
            [row.state.trajectory.conditions[row.branch] for row in rows],
        )
        outputs = iter(self.model.finish(self._through_blocks(tokens, rows)))
        return [[next(outputs) for _ in state.trajectory.branches(state.timestep)] for state in states]

    @torch.inference_mode()
    def advance(self, state: DiffusionState, outputs: Sequence[Tensor]) -> None:
        """One sampler step. outputs: what `predict` gave for this state."""
        trajectory = state.trajectory
        output = trajectory.combine(outputs, state.timestep)
        timestep = trajectory.sampler.timesteps[state.step]
        state.latents = trajectory.sampler.step(output[None], timestep, state.latents[None], return_dict=False)[0][0]
        state.step += 1
        if state.is_done and not bool(torch.isfinite(state.latents).all()):
            raise StageError("the latents are not finite; use dtype bfloat16 or float32, or a smaller guidance_scale")

    @torch.inference_mode()
    def decode(self, state: DiffusionState) -> Tensor | None:
        """Decodes one more piece of a denoised state; the finished output with the last one, None before it."""
        if state.decoder is None:
            state.decoder = self.model.decode(state.latents, state.trajectory.kept)
        num_pieces = self.model.num_pieces(state.latents, state.trajectory.kept)
        piece = next(state.decoder, None)
        if piece is None:
            raise StageError(f"the decoder ended after {len(state.pieces)} of {num_pieces} pieces")
        state.pieces.append(piece)
        return self.model.assemble(state.pieces, state.params) if len(state.pieces) == num_pieces else None

    def release(self, request_id: str, index: int | None = None) -> None:
        """Frees the step caches of a request, or of one of its states."""
        owner = (request_id,) if index is None else (request_id, index)
        self.caches.invalidate_where(lambda key: isinstance(key, tuple) and key[: len(owner)] == owner)

    def _through_blocks(self, tokens: TokenBatch, rows: Sequence[Row]) -> TokenBatch:
        lead = self._cache_type.num_lead_blocks
        if lead == 0:
            return self.model.run_blocks(tokens, 0, self.model.num_blocks)
        before = tokens.per_row()
        tokens = self.model.run_blocks(tokens, 0, lead)
        hidden = tokens.per_row()
        leads = [after - first for after, first in zip(hidden, before, strict=True)]
        caches = [self._cache_of(rows[index]) for index in tokens.order]
        rests = [cache.reuse(residual) for cache, residual in zip(caches, leads, strict=True)]
        computed = [index for index, rest in enumerate(rests) if rest is None]
        final = [first if rest is None else first + rest for first, rest in zip(hidden, rests, strict=True)]
        if computed:
            chosen = tokens if len(computed) == len(rests) else tokens.select(computed)
            finished = self.model.run_blocks(chosen, lead, self.model.num_blocks).per_row()
            for index, result in zip(computed, finished, strict=True):
                final[index] = result
                caches[index].update(leads[index], result - hidden[index])
        for index, cache in enumerate(caches):
            row = rows[tokens.order[index]]
            row.state.num_reused += rests[index] is not None
            self.caches.set_cache(row.cache_key, cache, cache.num_bytes)
        return tokens.with_rows(final)

    def _cache_of(self, row: Row) -> StepCache:
        """The row's step cache; a fresh one at the first step and after an eviction."""
        cache: StepCache | None = self.caches.get_cache(row.cache_key)
        return self._cache_type(self._threshold) if cache is None else cache
