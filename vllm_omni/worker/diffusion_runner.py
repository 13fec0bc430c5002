"""Runs one denoising step for a batch of diffusion states: model rows, step caches, guidance, sampler. Owns the step
caches' memory.

Every state is its own: latents, sampler, texts and caches are shared with nobody. `predict` changes nothing but
caches, so a batch that failed can be tried again row by row; `advance` commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.core.caches.base import StepCache
from vllm_omni.core.dit_cache_manager import DiTCacheManager
from vllm_omni.errors import StageError
from vllm_omni.models.diffusion import DiffusionModel, Sampler, TokenBatch
from vllm_omni.params import DiffusionParams

POSITIVE, NEGATIVE = "positive", "negative"


@dataclass(slots=True)
class DiffusionState:
    """One picture (or other output) on its way. texts: by branch, from the model's `encode_text`. step: how many
    are done.
    """

    request_id: str
    index: int
    params: DiffusionParams
    guidance_scale: float
    num_tokens: int
    latents: Tensor
    sampler: Sampler
    texts: dict[str, Tensor]
    step: int = 0
    num_reused: int = 0

    @property
    def key(self) -> str:
        return f"{self.request_id}/{self.index}"

    @property
    def num_steps(self) -> int:
        return len(self.sampler.timesteps)

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps

    @property
    def timestep(self) -> float:
        return float(self.sampler.timesteps[self.step])


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
    def predict(self, states: Sequence[DiffusionState]) -> list[Tensor]:
        """The sampler's model output [C, h, w] for each state, guidance applied."""
        rows = [row for state in states for row in self._rows(state)]
        tokens = self.model.begin(
            [row.state.latents for row in rows],
            [row.state.timestep for row in rows],
            [row.state.texts[row.branch] for row in rows],
        )
        outputs = iter(self.model.finish(self._through_blocks(tokens, rows)))
        return [self._guided(state, [next(outputs) for _ in self._rows(state)]) for state in states]

    @torch.inference_mode()
    def advance(self, state: DiffusionState, output: Tensor) -> None:
        """One sampler step. output: [C, h, w] from `predict`."""
        timestep = state.sampler.timesteps[state.step]
        state.latents = state.sampler.step(output[None], timestep, state.latents[None], return_dict=False)[0][0]
        state.step += 1
        if state.is_done and not bool(torch.isfinite(state.latents).all()):
            raise StageError("the latents are not finite; use dtype bfloat16 or float32, or a smaller guidance_scale")

    @torch.inference_mode()
    def decode(self, state: DiffusionState) -> Tensor:
        """[H, W, 3] uint8."""
        return self.model.decode(state.latents)

    def release(self, request_id: str) -> None:
        """Frees the step caches of a request."""
        self.caches.invalidate_where(lambda key: isinstance(key, tuple) and key[0] == request_id)

    def _rows(self, state: DiffusionState) -> list[Row]:
        rows = [Row(state, POSITIVE)]
        if self.model.guided_now(state.params, state.guidance_scale, state.timestep):
            rows.append(Row(state, NEGATIVE))
        return rows

    def _guided(self, state: DiffusionState, outputs: list[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        return self.model.guide(outputs[0], outputs[1], state.guidance_scale, state.params)

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
