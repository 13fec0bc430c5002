"""The Z-Image transformer (Tongyi-MAI, 2025; published as diffusers' ZImageTransformer2DModel), for batches of any
mix of sizes.

The tokens of all rows lie packed in one [N, D] tensor, so matrix products waste nothing on padding. Rows of equal
geometry stand together as a `Group`; what is per row (modulation, attention, positions) works on a group as a dense
[rows, length, D] view. The text side does not see the timestep: `encode_text` runs once per request, not once per
step. Knows no sampler, no guidance and no cache.

Legend: R rows, N packed tokens of all rows, L tokens of a row (image, padded to 32, then text), D width, H heads, A
modulation width, C latent channels, T text tokens padded to 32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.layers.linear import Linear
from vllm_omni.layers.lora import packed
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.shard import ALONE, Shards
from vllm_omni.layers.weights import Target, locate_merged
from vllm_omni.models.z_image.blocks import Block, FinalLayer, Stack, TimestepEmbedder
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.models.z_image.packing import Group, Tokens, grouped, padded
from vllm_omni.worker.diffusion.packing import Span, joined
from vllm_omni.worker.diffusion.patches import PATCH, Rows, dense, patchified, unpatchified
from vllm_omni.worker.diffusion.rope_tables import RopeTables, grid_positions
from vllm_omni.worker.diffusion.sequence import split_sequence


class ZImageTransformer(nn.Module):
    """latents and text -> velocity, for rows of any sizes; see the module's docstring."""

    def __init__(self, config: ZImageConfig, shards: Shards = ALONE) -> None:
        """shards: this rank's share of `layers`; what stands around them is whole, and the first rank's."""
        super().__init__()
        self.config = config
        self._sequence = shards.sequence
        self.x_embedder = Linear(PATCH * PATCH * config.in_channels, config.dim)
        self.cap_norm = RMSNorm(config.cap_feat_dim, config.norm_eps)
        self.cap_embedder = Linear(config.cap_feat_dim, config.dim)
        self.t_embedder = TimestepEmbedder(config.modulation_width)
        self.noise_refiner = Stack(Block(config) for _ in range(config.n_refiner_layers))
        self.context_refiner = Stack(Block(config, modulated=False) for _ in range(config.n_refiner_layers))
        self.layers = Stack(Block(config, shards=shards) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self._ropes = RopeTables(positions, config.axes_dims, config.rope_theta)

    def encode_text(self, features: Tensor, is_padding: Tensor) -> Tensor:
        """States of prompts [R, T, cap_feat_dim] and where they are padding [R, T] -> [R, T, D]; the same for
        every step.
        """
        hidden = self.cap_embedder(self.cap_norm(features))
        hidden = torch.where(is_padding[..., None], self.cap_pad_token.to(hidden.dtype), hidden)
        rows, length = is_padding.shape
        span = self._span(slice(0, rows), 0, length, self._rope(0, 0, length))
        hidden = self.context_refiner.run(hidden.flatten(0, 1), (span,))
        return hidden.unflatten(0, (rows, length))

    def embed(self, latents: Rows, timesteps: Tensor, texts: Rows) -> Tokens:
        """Embeds rows. latents: [C, h, w] each; timesteps: [R] in [0, 1], 1 is clean; texts: [T, D] each, from
        `encode_text`.
        """
        geometries = [(*latent.shape[1:], len(text)) for latent, text in zip(latents, texts, strict=True)]
        order = sorted(range(len(geometries)), key=geometries.__getitem__)
        groups = grouped([geometries[row] for row in order])
        with packed(order, *_image_packings(groups)):
            time = self.t_embedder(timesteps[order] * self.config.t_scale).to(texts[0].dtype)
            images = self._embed_images(latents, order, groups, time)
        parts = [
            torch.cat([image, dense(texts, order[group.rows])], dim=1).flatten(0, 1)
            for image, group in zip(images, groups, strict=True)
        ]
        return Tokens(joined(parts), time, groups, tuple(order))

    def run_blocks(self, tokens: Tokens, start: int, stop: int) -> Tokens:
        """Blocks start .. stop - 1 of the main stack."""
        hidden, spans = tokens.hidden, self._spans(tokens)
        with split_sequence(hidden, spans, self._sequence) as split:
            split.hidden = self.layers.run(split.hidden, split.spans, tokens.condition, start, stop)
        return replace(tokens, hidden=split.hidden)

    def read_tokens(self, plain: Any, tensors: Sequence[Tensor]) -> Tokens:
        """See BlockStack."""
        return Tokens.of_content(plain, tensors)

    def modulated_input(self, tokens: Tokens) -> list[Tensor]:
        """[L, D] per packed row: what the first block of the main stack attends with."""
        block: Block = next(self.layers.present())  # type: ignore[assignment]
        scale = block.adaLN_modulation(tokens.condition).chunk(4, dim=-1)[0]  # type: ignore[misc]
        hidden = block.modulated_input(tokens.hidden, self._spans(tokens), scale)
        return replace(tokens, hidden=hidden).per_row()

    def velocity_patches(self, tokens: Tokens) -> list[Tensor]:
        """The model's answer as patches: [rows, height * width, 4 C] for each group."""
        spans = self._spans(tokens)
        with packed(range(len(tokens.order)), *tokens.packings):
            patches = self.final_layer(tokens.hidden, spans, tokens.condition)
        return [
            patches[span.tokens].unflatten(0, (span.num_rows, span.length))[:, : group.height * group.width]
            for span, group in zip(spans, tokens.groups, strict=True)
        ]

    def unembed(self, tokens: Tokens) -> list[Tensor]:
        """Velocities [C, h, w] (clean latents minus noise), in the order of the rows that `embed` was given."""
        velocities: list[Tensor] = []
        for patches, group in zip(self.velocity_patches(tokens), tokens.groups, strict=True):
            velocities += unpatchified(patches, group.height, group.width)
        placed = sorted(zip(tokens.order, velocities, strict=True), key=lambda pair: pair[0])
        return [velocity for _, velocity in placed]

    def forward(self, latents: Rows, timesteps: Tensor, texts: Rows) -> list[Tensor]:
        """All of the above in one go."""
        return self.unembed(self.run_blocks(self.embed(latents, timesteps, texts), 0, len(self.layers)))

    def _embed_images(self, latents: Rows, order: Sequence[int], groups: Sequence[Group], time: Tensor) -> list[Tensor]:
        """[rows, image tokens, D] for each group, after the noise refiner."""
        parts, spans, start = [], [], 0
        pixels = [patchified(dense(latents, order[group.rows])).to(self.x_pad_token.dtype) for group in groups]
        embedded = self.x_embedder(joined([part.flatten(0, 1) for part in pixels]))
        packed_groups = embedded.split([part.shape[0] * part.shape[1] for part in pixels])
        for group, patches in zip(groups, packed_groups, strict=True):
            patches = patches.unflatten(0, (group.num_rows, -1))
            missing = group.num_image - patches.shape[1]
            if missing:
                padding = self.x_pad_token.to(patches.dtype).expand(group.num_rows, missing, -1)
                patches = torch.cat([patches, padding], dim=1)
            parts.append(patches.flatten(0, 1))
            rope = self._rope(group.height, group.width, group.num_text)[: group.num_image]
            spans.append(self._span(group.rows, start, group.num_image, rope))
            start = spans[-1].tokens.stop
        hidden = self.noise_refiner.run(joined(parts), spans, time)
        return [hidden[span.tokens].unflatten(0, (span.num_rows, span.length)) for span in spans]

    def _spans(self, tokens: Tokens) -> list[Span]:
        spans, start = [], 0
        for group in tokens.groups:
            rope = self._ropes.of((group.height, group.width, group.num_text), tokens.hidden.device)
            spans.append(self._span(group.rows, start, group.length, rope))
            start = spans[-1].tokens.stop
        return spans

    @staticmethod
    def _span(rows: slice, start: int, length: int, rope: Tensor) -> Span:
        num_rows = rows.stop - rows.start
        return Span(rows, slice(start, start + num_rows * length), num_rows, length, rope)

    def _rope(self, height: int, width: int, num_text: int) -> Tensor:
        """[L, head_dim / 2, 2] for image then text."""
        return self._ropes.of((height, width, num_text), self.x_pad_token.device)

    def locate(self, name: str) -> Target | None:
        """Published name -> parameter here (see layers/weights.py)."""
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        return locate_merged(self, name, MERGED)

    def is_ignored(self, name: str) -> bool:
        return False


def positions(geometry: tuple[int, int, int]) -> Tensor:
    """[L, 3] of (height, width, text tokens), image then text. Text stands at (1.., 0, 0), the image at (T + 1, y, x),
    padding at 0.
    """
    height, width, num_text = geometry
    placed = torch.zeros(padded(height * width) + num_text, 3, dtype=torch.long)
    placed[: height * width, 0] = num_text + 1
    placed[: height * width, 1:] = grid_positions(height, width)
    placed[len(placed) - num_text :, 0] = torch.arange(1, num_text + 1)
    return placed


MERGED = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "w1": "w13", "w3": "w13"}
RENAMED = (
    (r"^all_x_embedder\.2-1\.", "x_embedder."),
    (r"^all_final_layer\.2-1\.", "final_layer."),
    (r"^cap_embedder\.0\.", "cap_norm."),
    (r"^cap_embedder\.1\.", "cap_embedder."),
    (r"\.adaLN_modulation\.[01]\.", ".adaLN_modulation."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
)


def _image_packings(groups: Sequence[Group]) -> tuple[list[int], ...]:
    """Of each packed row the patches, the tokens that they are padded to, and what comes from the timestep."""
    rows = [group for group in groups for _ in range(group.num_rows)]
    return [group.height * group.width for group in rows], [group.num_image for group in rows], [1] * len(rows)
