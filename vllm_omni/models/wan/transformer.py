"""The Wan transformer (arXiv 2503.20314; published as diffusers' WanTransformer3DModel), for batches of any mix of
sizes and lengths.

The tokens of all rows lie packed in one [N, D] tensor, without padding between rows. The keys and values of a text are
computed once per request and branch (`encode_text`). Knows no sampler, no guidance and no VAE.

Legend: R rows, N packed tokens of all rows, L tokens of a row, D width, C latent channels, f, h, w frames, rows and
columns of latents, t text tokens, J width of the text encoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.blocks import Blocks
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.lora import packed
from vllm_omni.layers.norm import LayerNorm
from vllm_omni.layers.packing import linear
from vllm_omni.layers.weights import Target, locate_merged
from vllm_omni.models.wan.blocks import Block, BlockInputs
from vllm_omni.models.wan.config import WanConfig
from vllm_omni.models.wan.films import Films, Geometry, grouped
from vllm_omni.worker.diffusion.cross_attention import CrossAttentionKV, packed_order
from vllm_omni.worker.diffusion.packing import modulated_rows
from vllm_omni.worker.diffusion.rope_tables import RopeTables, grid_positions
from vllm_omni.worker.diffusion.timestep import TimestepEmbedder

MAX_TEXT = 512  # tokens; shorter texts are filled up with zeros, which are attended to as any other
THETA = 10_000.0


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """What one row is given besides its latents; no step changes it."""

    text: CrossAttentionKV
    is_continued: bool  # whether the first frame of its latents is given, and clean


class WanTransformer(nn.Module):
    """Latents and their conditions -> velocities, for rows of any sizes; see the module's docstring."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.time_embedder = TimestepEmbedder(config.freq_dim, dim, bias=True)
        self.time_proj = Linear(dim, 6 * dim)
        self.text_in = nn.ModuleDict(
            {"linear_1": Linear(config.text_dim, dim, activation="gelu"), "linear_2": Linear(dim, dim)}
        )
        self.blocks = Blocks(Block(config, index) for index in range(config.num_layers))
        self.norm_out = LayerNorm(config.eps)
        self.proj_out = Linear(dim, config.patch_channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))
        self._ropes = RopeTables(positions, config.rope_dims, THETA)

    @property
    def device(self) -> torch.device:
        return self.scale_shift_table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_shift_table.dtype

    def encode_text(self, states: Tensor) -> CrossAttentionKV:
        """[t, J] of the text encoder, at most MAX_TEXT -> what cross-attention reads. The zeros that fill it up are all
        one key: the scores of two rows of them say how many they stand for.
        """
        num_zeros = MAX_TEXT - len(states)
        padded = F.pad(states.to(self.scale_shift_table), (0, 0, 0, 2 if num_zeros else 0))
        embedded = self.text_in["linear_2"](self.text_in["linear_1"](padded))
        layers = tuple(block.attn2.encode(embedded) for block in self._present())
        return CrossAttentionKV(layers, counting_bias(embedded, num_zeros) if num_zeros else None)

    def embed(self, latents: Sequence[Tensor], timesteps: Tensor, conditions: Sequence[Condition]) -> Films:
        """Rows before the first block. latents: [C, f, h, w] each; timesteps: [R] in 0 to 1000, 0 is clean."""
        geometries = [
            self.geometry(tuple(latent.shape[1:]), condition.is_continued)
            for latent, condition in zip(latents, conditions, strict=True)
        ]
        reads = [condition.text for condition in conditions]
        order = packed_order(geometries, reads)
        patches = torch.cat([self._patches(latents[row]) for row in order])
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        is_any_continued = any(geometry.is_continued for geometry in geometries)
        with packed(order, [1] * len(order)):
            times = self._times(timesteps[list(order)])
            resting = self._times(timesteps.new_zeros(1)) if is_any_continued else None
        return Films(
            hidden=linear(patches.to(self.dtype), weight, bias),
            times=times,
            resting=resting,
            groups=grouped([geometries[row] for row in order]),
            reads=tuple(reads[row] for row in order),
            order=order,
        )

    def run_blocks(self, films: Films, start: int, stop: int) -> Films:
        """Blocks start .. stop - 1."""
        hidden, inputs = films.hidden, self._inputs(films)
        for block in self._present(start, stop):
            hidden = block(hidden, inputs)
        return replace(films, hidden=hidden)

    def modulated_input(self, films: Films) -> list[Tensor]:
        """[L, D] per packed row: what the first block's self-attention reads."""
        hidden = next(self._present()).modulated_input(films.hidden, self._inputs(films))
        return replace(films, hidden=hidden).per_row()

    def unembed(self, films: Films) -> list[Tensor]:
        """Velocities [C, f, h, w] (noise minus clean latents), in the order of the rows that `embed` was given."""
        inputs = self._inputs(films)
        shift, scale = (self.scale_shift_table + films.vectors()[:, 6:]).unbind(1)
        modulated = modulated_rows(films.hidden, self.norm_out, inputs.modulated, scale, shift)
        with packed(range(len(films.order)), films.lengths):
            patches = self.proj_out(modulated)
        found = zip(films.order, patches.split(films.lengths), films.geometries, strict=True)
        placed = {row: self._unpatched(part, geometry) for row, part, geometry in found}
        return [placed[row] for row in range(len(placed))]

    def geometry(self, size: tuple[int, ...], is_continued: bool) -> Geometry:
        """size: frames, rows and columns of latents."""
        frames, height, width = (side // step for side, step in zip(size, self.config.patch_size, strict=True))
        return Geometry(frames, height, width, is_continued)

    def _present(self, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        return cast(Iterator[Block], self.blocks.present(start, stop))

    def _times(self, timesteps: Tensor) -> Tensor:
        """[R] -> [R, 7, D], see Films."""
        embedding = self.time_embedder(timesteps)
        return torch.cat([self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1)), embedding[:, None]], dim=1)

    def _inputs(self, films: Films) -> BlockInputs:
        spans = films.spans(lambda geometry: self._ropes.of(geometry, films.hidden.device))
        return BlockInputs(spans, films.modulated_spans(spans), films.vectors()[:, :6], films.reading_runs())

    def _patches(self, latents: Tensor) -> Tensor:
        """[C, f, h, w] -> [L, C x patch], as a convolution over whole patches reads them."""
        _, down, across = self.config.patch_size
        tiles = latents.unflatten(-1, (-1, across)).unflatten(-3, (-1, down))  # [C, f, h', down, w', across]
        return tiles.permute(1, 2, 4, 0, 3, 5).flatten(3).flatten(0, 2)

    def _unpatched(self, patches: Tensor, geometry: Geometry) -> Tensor:
        """[L, patch x C] -> [C, f, h, w]."""
        _, down, across = self.config.patch_size
        tiles = patches.view(geometry.frames, geometry.height, geometry.width, down, across, -1)
        return tiles.permute(5, 0, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def locate(self, name: str) -> Target | None:
        """Published name -> parameter here (see layers/weights.py)."""
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        return locate_merged(self, name, KEYS_VALUES if ".attn2." in name else QUERIES_KEYS_VALUES)

    def is_ignored(self, name: str) -> bool:
        return False


def counting_bias(rows: Tensor, count: int) -> Tensor:
    """[1, 1, 1, t] in the dtype of the rows [t, D], to be added to their scores, so that the last two, which are alike,
    count as so many: the second as what the first, whose logarithm is rounded down to 16 bits, leaves over.
    """
    bias = rows.new_zeros(len(rows))
    bias[-2] = math.log(count) * (1 - torch.finfo(rows.dtype).eps)
    bias[-1] = math.log(max(count - math.exp(float(bias[-2])), torch.finfo(torch.float32).tiny))
    return bias[None, None, None]


def positions(geometry: Geometry) -> Tensor:
    """[L, 3] integers: frame, row and column of each token."""
    grid = grid_positions(geometry.height, geometry.width)
    frames = torch.arange(geometry.frames).repeat_interleave(len(grid))
    return torch.cat([frames[:, None], grid.repeat(geometry.frames, 1)], dim=-1)


QUERIES_KEYS_VALUES = dict.fromkeys(("to_q", "to_k", "to_v"), "qkv")
KEYS_VALUES = dict.fromkeys(("to_k", "to_v"), "keys_values")
RENAMED = (
    (r"^condition_embedder\.time_", "time_"),
    (r"^condition_embedder\.text_embedder\.", "text_in."),
    (r"\.to_out\.0\.", ".out."),
    (r"\.ffn\.net\.0\.proj\.", ".up."),
    (r"\.ffn\.net\.2\.", ".down."),
)
