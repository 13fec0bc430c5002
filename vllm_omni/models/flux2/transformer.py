"""The FLUX.2 transformer (Black Forest Labs, 2025; published as diffusers' Flux2Transformer2DModel), for batches of any
mix of sizes, texts, references and timesteps.

What the timestep does not change is embedded once per request (`embed_text`, `embed_reference`), and references that
attend only to each other leave their keys and values behind (`remember`). Modulations of all blocks come from one
product. Knows no sampler, no guidance and no step cache.

Legend: R rows, N packed tokens of all rows, L tokens of a row (text, picture, references), D width, H heads, C latent
channels, h, w sides of latents, d head size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.blocks import Blocks
from vllm_omni.layers.linear import Linear, MergedLinear
from vllm_omni.layers.lora import packed
from vllm_omni.layers.modulation import modulated
from vllm_omni.layers.norm import LayerNorm
from vllm_omni.layers.shard import ALONE, Shards
from vllm_omni.layers.weights import Target, locate_merged
from vllm_omni.models.flux2.blocks import QKV, DoubleBlock, SingleBlock
from vllm_omni.models.flux2.config import NUM_AXES, Flux2Config
from vllm_omni.worker.diffusion.joint import Geometry, JointSpans, JointTokens, grouped, packing_order, spans_of
from vllm_omni.worker.diffusion.packing import Seen, joined
from vllm_omni.worker.diffusion.rope_tables import RopeTables, grid_positions
from vllm_omni.worker.diffusion.timestep import TimestepEmbedder

REFERENCE_DISTANCE = 10  # on the axis of time, from a picture to the next
MODULATIONS = {  # published name -> how many vectors, in the order in which they are stacked here
    "double_stream_modulation_img.linear": 6,
    "double_stream_modulation_txt.linear": 6,
    "single_stream_modulation.linear": 3,
    "norm_out.linear": 2,
}


@dataclass(frozen=True, slots=True)
class Reference:
    """A picture that others are drawn after."""

    tokens: Tensor  # [h * w, D], embedded
    grid: tuple[int, int]  # h, w


@dataclass(frozen=True, slots=True)
class Condition:
    """What a row is drawn after; the same for every step."""

    text: Tensor  # [T, D], embedded
    references: tuple[Reference, ...] = ()
    remembered: Tensor | None = None  # [blocks, 2, H, tokens, d] in place of references

    @property
    def num_remembered(self) -> int:
        return 0 if self.remembered is None else self.remembered.shape[3]


class Flux2Transformer(nn.Module):
    """latents and conditions -> velocity, for rows of any sizes; see the module's docstring."""

    def __init__(self, config: Flux2Config, shards: Shards = ALONE) -> None:
        """shards: this rank's share of the blocks; what stands around them is whole, and the first rank's."""
        super().__init__()
        self.config = config
        self.x_embedder = Linear(config.in_channels, config.dim, bias=False)
        self.context_embedder = Linear(config.joint_attention_dim, config.dim, bias=False)
        self.timestep_embedder = TimestepEmbedder(config.timestep_guidance_channels, config.dim, bias=False)
        self.guidance_embedder = None
        if config.guidance_embeds:
            self.guidance_embedder = TimestepEmbedder(config.timestep_guidance_channels, config.dim, bias=False)
        self.modulation = MergedLinear(config.dim, {name: count * config.dim for name, count in MODULATIONS.items()})
        self.double_blocks = Blocks(DoubleBlock(config, shards.tensor) for _ in range(config.num_layers))
        self.single_blocks = Blocks(SingleBlock(config, shards.tensor) for _ in range(config.num_single_layers))
        self.norm_out = LayerNorm(config.eps)
        self.proj_out = Linear(config.dim, config.in_channels, bias=False)
        self._ropes = RopeTables(positions, config.axes_dims_rope, config.rope_theta)

    @property
    def device(self) -> torch.device:
        return self.x_embedder.weight.device

    def embed_text(self, states: Tensor) -> Tensor:
        """[T, joint_attention_dim] -> [T, D]."""
        return self.context_embedder(states.to(self.context_embedder.weight))

    def embed_reference(self, latents: Tensor) -> Reference:
        """latents: [C, h, w]"""
        return Reference(self.x_embedder(self._as_tokens(latents)), (latents.shape[1], latents.shape[2]))

    def embed(
        self, latents: Sequence[Tensor], times: Tensor, conditions: Sequence[Condition], guidance: Tensor | None = None
    ) -> JointTokens:
        """Embeds rows. latents: [C, h, w] each; times: [R] in 0 to 1000, 1000 is pure noise; guidance: [R], for a model
        that takes it.
        """
        geometries = [
            Geometry(len(row.text), (_grid(latent), *(one.grid for one in row.references)), row.num_remembered)
            for latent, row in zip(latents, conditions, strict=True)
        ]
        order = packing_order(geometries)
        with packed(order, [geometries[row].num_picture for row in order], [1] * len(order)):
            pictures = self.x_embedder(torch.cat([self._as_tokens(latents[row]) for row in order]))
            vectors = self._modulate(times[order], None if guidance is None else guidance[order])
        split = pictures.split([geometries[row].num_picture for row in order])
        images = [
            part
            for row, picture in zip(order, split, strict=True)
            for part in (picture, *(one.tokens for one in conditions[row].references))
        ]
        return JointTokens(
            torch.cat([conditions[row].text for row in order]),
            pictures if len(images) == len(order) else torch.cat(images),
            vectors,
            grouped([geometries[row] for row in order]),
            tuple(order),
            tuple(conditions[row].remembered for row in order),
        )

    def run_blocks(self, tokens: JointTokens, start: int, stop: int) -> JointTokens:
        """Blocks start .. stop - 1, those with two streams first."""
        return self._run_blocks(tokens, start, stop, lambda layer: _Recall(tokens, layer))

    def read_tokens(self, plain: Any, tensors: Sequence[Tensor]) -> JointTokens:
        """See BlockStack."""
        return JointTokens.of_content(plain, tensors)

    def modulated_input(self, tokens: JointTokens) -> list[Tensor]:
        """[L, D] per packed row: what the first block attends with."""
        block: DoubleBlock = next(self.double_blocks.present())  # type: ignore[assignment]
        of_text, of_image, _, _ = self._modulations(tokens)
        spans = self._spans(tokens)
        text = block.text.modulated_input(tokens.text, spans.text, of_text)
        image = block.image.modulated_input(tokens.image, spans.image, of_image)
        return replace(tokens, text=text, image=image).per_row()

    def unembed(self, tokens: JointTokens) -> list[Tensor]:
        """Velocities [C, h, w] (noise minus clean latents), in the order of the rows that `embed` was given."""
        scale, shift = self._modulations(tokens)[3]
        velocities: list[Tensor] = []
        normed = [
            modulated(picture, self.norm_out, scale[group.rows, None], shift[group.rows, None])
            for group, picture in zip(tokens.groups, tokens.pictures(tokens.image), strict=True)
        ]
        lengths = [group.geometry.num_picture for group in tokens.groups for _ in range(group.num_rows)]
        with packed(range(len(lengths)), lengths):
            projected = self.proj_out(joined([part.flatten(0, 1) for part in normed]))
        parts = projected.split([part.shape[0] * part.shape[1] for part in normed])
        for group, part in zip(tokens.groups, parts, strict=True):
            dense = part.unflatten(0, (group.num_rows, -1))
            velocities += dense.transpose(1, 2).unflatten(2, group.geometry.grids[0])
        placed = sorted(zip(tokens.order, velocities, strict=True), key=lambda pair: pair[0])
        return [velocity for _, velocity in placed]

    def remember(self, references: Sequence[Reference]) -> Tensor:
        """The keys and values that references have where they attend only to each other and are clean, whatever is
        drawn after them: [blocks, 2, H, tokens, d].
        """
        kept: list[Tensor] = []

        def keep(index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            kept.append(torch.stack([key[0], value[0]]))
            return key, value

        image = torch.cat([reference.tokens for reference in references])
        geometry = Geometry(0, ((0, 0), *(reference.grid for reference in references)))
        clean = self._modulate(torch.zeros(1, device=self.device), None)
        tokens = JointTokens(image[:0], image, clean, grouped([geometry]), (0,))
        self._run_blocks(tokens, 0, self.config.num_blocks, lambda layer: keep)
        return torch.stack(kept)

    def forward(
        self, latents: Sequence[Tensor], times: Tensor, conditions: Sequence[Condition], guidance: Tensor | None = None
    ) -> list[Tensor]:
        """All of the above in one go."""
        tokens = self.embed(latents, times, conditions, guidance)
        return self.unembed(self.run_blocks(tokens, 0, self.config.num_blocks))

    def _run_blocks(self, tokens: JointTokens, start: int, stop: int, seen: Callable[[int], Seen]) -> JointTokens:
        """seen: block -> what is attended to in it."""
        spans = self._spans(tokens)
        of_text, of_image, of_both, _ = self._modulations(tokens)
        num_double, text, image = self.config.num_layers, tokens.text, tokens.image
        for layer, block in enumerate(self.double_blocks.present(start, min(stop, num_double)), start):
            text, image = block(text, image, spans, (of_text, of_image), seen(layer))
        tokens = replace(tokens, text=text, image=image)
        if stop <= max(start, num_double):
            return tokens
        hidden = tokens.both()
        first = max(start, num_double)
        for layer, block in enumerate(self.single_blocks.present(first - num_double, stop - num_double), first):
            hidden = block(hidden, spans.both, of_both, seen(layer))
        return tokens.with_both(hidden)

    def _modulate(self, times: Tensor, guidance: Tensor | None) -> Tensor:
        """[R] -> [R, 17 D], as `_modulations` parts it."""
        embedded = self.timestep_embedder(times)
        if guidance is not None and self.guidance_embedder is not None:
            embedded = embedded + self.guidance_embedder(guidance * 1000)
        return self.modulation(F.silu(embedded))

    def _modulations(self, tokens: JointTokens) -> tuple[Sequence[Tensor], ...]:
        """[R, D] each, of text and image in blocks with two streams, of single blocks, and of the end."""
        parts = tokens.condition.chunk(sum(MODULATIONS.values()), dim=-1)
        return parts[6:12], parts[:6], parts[12:15], parts[15:]

    def _as_tokens(self, latents: Tensor) -> Tensor:
        """[C, h, w] -> [h * w, C]"""
        return latents.flatten(1).T.to(self.x_embedder.weight)

    def _spans(self, tokens: JointTokens) -> JointSpans:
        device = tokens.image.device
        return spans_of(tokens.groups, lambda one: self._ropes.of(replace(one, num_remembered=0), device))

    def locate(self, name: str) -> Target | None:
        """Published name -> parameter here (see layers/weights.py)."""
        merged = name.removesuffix(".weight")
        if merged in self.modulation.parts:
            return Target("modulation.weight", self.modulation.rows(merged))
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        return locate_merged(self, name, MERGED)

    def is_ignored(self, name: str) -> bool:
        return False


class _Recall:
    """What the tokens of a batch attend to in a block: those of their row, and what is remembered for it."""

    def __init__(self, tokens: JointTokens, layer: int) -> None:
        self._tokens = tokens
        self._layer = layer

    def __call__(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        group = self._tokens.groups[index]
        if not group.geometry.num_remembered:
            return key, value
        rows = [kept[self._layer] for kept in self._tokens.remembered[group.rows] if kept is not None]
        remembered = torch.stack(rows)  # [rows, 2, H, tokens, d]
        return torch.cat([key, remembered[:, 0]], dim=2), torch.cat([value, remembered[:, 1]], dim=2)


def positions(geometry: Geometry) -> Tensor:
    """[L, 4]: text at (0, 0, 0, i), the picture at (0, y, x, 0), references behind each other on the axis of time."""
    placed = torch.zeros(geometry.length, NUM_AXES, dtype=torch.long)
    placed[: geometry.num_text, 3] = torch.arange(geometry.num_text)
    start = geometry.num_text
    for index, (height, width) in enumerate(geometry.grids):
        stop = start + height * width
        placed[start:stop, 0] = REFERENCE_DISTANCE * index
        placed[start:stop, 1:3] = grid_positions(height, width)
        start = stop
    return placed


def _grid(latents: Tensor) -> tuple[int, int]:
    return latents.shape[1], latents.shape[2]


MERGED = dict.fromkeys(QKV, "qkv")
RENAMED = (
    (r"^time_guidance_embed\.", ""),
    (r"^transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj\.", r"double_blocks.\1.text.to_\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_", r"double_blocks.\1.text.norm_"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"double_blocks.\1.text.out."),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0\.", r"double_blocks.\1.image.out."),
    (r"^transformer_blocks\.(\d+)\.attn\.", r"double_blocks.\1.image."),
    (r"^transformer_blocks\.(\d+)\.ff_context\.", r"double_blocks.\1.text."),
    (r"^transformer_blocks\.(\d+)\.ff\.", r"double_blocks.\1.image."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.", r"single_blocks.\1.qkv_mlp."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.", r"single_blocks.\1.out."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.", r"single_blocks.\1."),
)
