"""Runs one denoising step for a batch of diffusion states: model rows, step caches, sampler; then decodes, piece by
piece.

Every state is its own: latents, trajectory and caches are shared with nobody. `predict` changes caches alone, and only
when it succeeds, so a batch that failed can be tried again row by row; `advance` commits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_omni.core.diffusion.caches.base import RowCache, StepCachePolicy
from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.errors import ConfigError, StageError
from vllm_omni.layers.lora import AdapterMix, UnplacedRowsError, acting, adapted, packed
from vllm_omni.layers.native.results import reused_results
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.diffusion.diffusion_model import DiffusionModel, TokenBatch, Trajectory, check_finite
from vllm_omni.worker.diffusion.previewer import preview_steps
from vllm_omni.worker.diffusion.request_noise import RequestNoise
from vllm_omni.worker.diffusion.tiling import Tiling, decode_tiles, num_tiles


@dataclass(slots=True)
class DiffusionState:
    """One output, or one chunk of it, on its way."""

    request_id: str
    index: int  # of the output or chunk
    params: DiffusionParams
    trajectory: Trajectory
    latents: Tensor
    generator: torch.Generator  # what the noise came from; a sampler that draws goes on with it
    adapters: AdapterMix | None = None  # that act on its rows
    tile: int | None = None  # latents along each side of the tiles that it is decoded in; None: whole
    step: int = 0  # how many are done
    num_reused: int = 0  # rows of steps that a step cache served
    pieces: list[Tensor] = field(default_factory=list)  # decoded so far; `decoder` gives the rest
    decoder: Iterator[Tensor] | None = None
    kept_caches: dict[str, RowCache] = field(default_factory=dict)  # of a resumed sample, by branch, until it runs

    @property
    def key(self) -> str:
        return f"{self.request_id}/{self.index}"

    @property
    def num_steps(self) -> int:
        return len(self.trajectory.timesteps)

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps

    @property
    def timestep(self) -> float:
        return float(self.trajectory.timesteps[self.step])


@dataclass(frozen=True, slots=True)
class Row:
    """One branch of one state: one row of the model's batch."""

    state: DiffusionState
    branch: str

    @property
    def cache_key(self) -> tuple[str, str, str | None]:
        adapters = self.state.adapters
        return (self.state.key, self.branch, None if adapters is None else adapters.key)


@dataclass(slots=True)
class CachedStep:
    """What a step cache saw of one row's step, until the step has succeeded."""

    row: Row
    cache: RowCache
    signal: Tensor | None = None  # [L, D]
    measured: Sequence[float] = ()
    rest_residual: Tensor | None = None  # [L, D] where the rest was computed

    @property
    def is_reused(self) -> bool:
        return self.cache.decides_to_reuse(self.row.state.step, self.measured)

    def commit(self) -> None:
        if self.rest_residual is None:
            self.row.state.num_reused += 1
            self.cache.note_reuse(self.row.state.step, self.signal, self.measured)
        else:
            self.cache.update(self.row.state.step, self.signal, self.measured, self.rest_residual)


class BlockRunner(Protocol):
    """What runs blocks: a model, or the first of the ranks that share it."""

    def run_blocks(self, tokens: Any, start: int, stop: int) -> TokenBatch:
        """As of a DiffusionModel."""


class DiffusionRunner:
    """`policy` makes the step cache of every row; `caches` holds them, in what each sample has reserved. tiling: of
    a model that can decode in tiles. lead: runs the model's blocks, where other ranks share them.
    """

    def __init__(
        self,
        model: DiffusionModel,
        policy: StepCachePolicy,
        caches: DiTCacheManager,
        tiling: Tiling | None = None,
        lead: BlockRunner | None = None,
    ) -> None:
        self.model = model
        self._blocks: BlockRunner = model if lead is None else lead
        self.tiling = tiling
        self.policy = policy
        self.caches = caches
        if policy.num_lead_blocks + policy.num_tail_blocks > model.num_blocks:
            raise ConfigError(
                f"cache.policy: always computes {policy.num_lead_blocks} lead and {policy.num_tail_blocks} tail blocks,"
                f" but the model has {model.num_blocks}; choose fewer, or another policy"
            )
        if policy.signal == "modulated_input" and not model.gives_modulated_input:
            raise ConfigError(
                f"cache.policy: {type(policy).__name__} judges by the modulated input, which {type(model).__name__}"
                " does not give; choose another policy"
            )

    @torch.inference_mode()
    def predict(self, states: Sequence[DiffusionState]) -> list[list[Tensor]]:
        """For each state the outputs of the branches that act now, in their order, each shaped as its latents. Where a
        model does not say how it packs rows, those of other adapters are computed by themselves.
        """
        rows = [Row(state, branch) for state in states for branch in state.trajectory.branches(state.timestep)]
        try:
            with adapted([row.state.adapters for row in rows]):
                return self._predict(states, rows)
        except UnplacedRowsError:
            parts = by_adapters(states)
            if len(parts) == 1:
                raise
        found = {state.key: outputs for part in parts for state, outputs in zip(part, self.predict(part), strict=True)}
        return [found[state.key] for state in states]

    def _predict(self, states: Sequence[DiffusionState], rows: Sequence[Row]) -> list[list[Tensor]]:
        tokens = self.model.embed(
            [row.state.latents for row in rows],
            [row.state.timestep for row in rows],
            [row.state.trajectory.conditions[row.branch] for row in rows],
        )
        tokens, steps = self._through_blocks(tokens, rows)
        with packed(tokens.order):  # the model itself knows how it unpacks
            outputs = iter(self.model.unembed(tokens))
        for step in steps:
            step.commit()
            self.caches.set_cache(step.row.cache_key, step.cache, step.cache.num_bytes, owner=step.row.state.key)
        return [[next(outputs) for _ in state.trajectory.branches(state.timestep)] for state in states]

    @torch.inference_mode()
    def advance(self, state: DiffusionState, outputs: Sequence[Tensor]) -> Tensor | None:
        """One sampler step; a preview [H, W, 3] uint8 where one is due. outputs: what `predict` gave for this state."""
        trajectory, latents = state.trajectory, state.latents
        output = trajectory.combine(outputs, state.timestep)
        timestep = trajectory.timesteps[state.step]
        with RequestNoise([state.generator]):
            stepped = trajectory.sampler.step(output[None], timestep, latents[None], return_dict=False)
        state.latents = trajectory.constrain(stepped[0][0], state.step)
        state.step += 1
        if state.is_done:
            check_finite(state.latents, "the latents")
        if state.step not in preview_steps(state.params.num_previews or 0, state.num_steps):
            return None
        return self.model.preview(trajectory.estimate(latents, output, state.step - 1))

    @torch.inference_mode()
    def decode(self, state: DiffusionState) -> Tensor | None:
        """Decodes one more piece of a denoised state; the finished output with the last one, None before it."""
        latents, kept, tile = state.latents, state.trajectory.kept, state.tile
        if state.decoder is None:
            state.decoder = self.model.decode(latents, kept) if tile is None else self._decode_tiles(latents, tile)
        num_pieces = self.model.num_pieces(latents, kept) if tile is None else num_tiles(latents, tile)
        with reused_results():
            piece = next(state.decoder, None)
        if piece is None:
            raise StageError(f"the decoder ended after {len(state.pieces)} of {num_pieces} pieces")
        state.pieces.append(piece)
        if len(state.pieces) < num_pieces:
            return None
        return self.model.assemble(state.pieces, state.params) if tile is None else torch.cat(state.pieces)

    def tile_of(self, latents: Tensor) -> int | None:
        """The side of the tiles in which such latents are decoded; None where they are decoded whole."""
        return None if self.tiling is None else self.tiling.tile_of(*latents.shape[1:])

    def cache_bytes(self, trajectory: Trajectory) -> int:
        """The most that the step cache of one sample may ever hold."""
        return 0 if self.policy.computes_all else self.policy.row_bytes(trajectory.num_tokens, self.model.token_bytes)

    def caches_of(self, state: DiffusionState) -> dict[str, RowCache]:
        """The step caches of a sample by branch, as they are between two steps."""
        rows = {branch: Row(state, branch) for branch in state.trajectory.conditions}
        found = {branch: self.caches.peek(row.cache_key) for branch, row in rows.items()}
        return {**state.kept_caches, **{branch: cache for branch, cache in found.items() if cache is not None}}

    def _decode_tiles(self, latents: Tensor, tile: int) -> Iterator[Tensor]:
        assert self.tiling is not None

        def decode(part: Tensor) -> Tensor:
            pixels = self.model.decode_pixels(part)
            check_finite(pixels, "the pixels")
            return pixels

        return decode_tiles(decode, latents, tile, self.tiling.size.scale)

    def _through_blocks(self, tokens: TokenBatch, rows: Sequence[Row]) -> tuple[TokenBatch, list[CachedStep]]:
        """The batch behind the last block, and what the step caches saw of it, in packed order."""
        if self.policy.computes_all:
            return self._run_blocks(tokens, 0, self.model.num_blocks), []
        last = self.model.num_blocks - self.policy.num_tail_blocks

        # 1 lead blocks
        tokens, signals = self._lead(tokens)

        # 2 decide per row
        steps = [CachedStep(rows[index], self._cache_of(rows[index])) for index in tokens.order]
        measure(steps, signals)
        hidden = tokens.per_row()
        computed = [index for index, step in enumerate(steps) if not step.is_reused]
        chosen = set(computed)
        final = [
            first if index in chosen else first + step.cache.predict(step.row.state.step)
            for index, (first, step) in enumerate(zip(hidden, steps, strict=True))
        ]

        # 3 the rest for rows that missed
        if computed:
            part = tokens if len(computed) == len(steps) else tokens.select(computed)
            finished = self._run_blocks(part, self.policy.num_lead_blocks, last).per_row()
            for index, result in zip(computed, finished, strict=True):
                final[index], steps[index].rest_residual = result, result - hidden[index]

        # 4 tail blocks
        return self._run_blocks(tokens.with_rows(final), last, self.model.num_blocks), steps

    def _run_blocks(self, tokens: TokenBatch, start: int, stop: int) -> TokenBatch:
        with packed(tokens.order, *packings(tokens)):
            return self._blocks.run_blocks(tokens, start, stop)

    def _lead(self, tokens: TokenBatch) -> tuple[TokenBatch, list[Tensor] | None]:
        """The batch behind the lead blocks, and the signal of each packed row where the policy asks for one."""
        policy, before = self.policy, tokens.per_row()
        with packed(tokens.order, *packings(tokens)):
            signals = self.model.modulated_input(tokens) if policy.signal == "modulated_input" else None
        if policy.num_lead_blocks:
            tokens = self._run_blocks(tokens, 0, policy.num_lead_blocks)
        if policy.signal == "lead_residual":
            signals = [after - first for after, first in zip(tokens.per_row(), before, strict=True)]
        return tokens, signals

    def _cache_of(self, row: Row) -> RowCache:
        """The row's step cache; at its first step here the one that it was resumed with, or a fresh one."""
        cache: RowCache | None = self.caches.get_cache(row.cache_key)
        if cache is None:
            cache = row.state.kept_caches.get(row.branch)
        return self.policy.new_row(row.state.num_steps) if cache is None else cache


def packings(tokens: TokenBatch) -> Sequence[Sequence[int]]:
    """Those of a batch, where adapters act."""
    return () if acting() is None else tokens.packings


def by_adapters(states: Sequence[DiffusionState]) -> list[list[DiffusionState]]:
    """The states with the same adapters, or none, together."""
    parts: dict[str | None, list[DiffusionState]] = {}
    for state in states:
        parts.setdefault(None if state.adapters is None else state.adapters.key, []).append(state)
    return list(parts.values())


def measure(steps: Sequence[CachedStep], signals: Sequence[Tensor] | None) -> None:
    """Fills in the rows' signals and what is measured of them, with one transfer to the host for all rows."""
    found: list[tuple[CachedStep, Tensor]] = []
    for index, step in enumerate(steps):
        step.signal = None if signals is None else signals[index]
        numbers = step.cache.measure(step.row.state.step, step.signal)
        if numbers is not None:
            found.append((step, numbers))
    if found:
        flat = iter(torch.cat([numbers for _, numbers in found]).tolist())
        for step, numbers in found:
            step.measured = [next(flat) for _ in range(len(numbers))]
