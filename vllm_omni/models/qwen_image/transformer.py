"""The Qwen-Image transformer (Qwen team, arXiv 2508.02324; published as diffusers' QwenImageTransformer2DModel), for
batches of any mix of sizes, of texts and of references.

Text and reference tokens do not see the timestep before the first block: `encode_text` and `encode_references` run once
per request, not once per step. Knows no sampler, no guidance and no cache.

Legend: R rows, Nt, Ni packed tokens of text and images, L tokens of a row, D width, C latent channels, T text tokens, J
width of the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.blocks import Blocks
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.lora import packed
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.shard import ALONE, Shards
from vllm_omni.layers.weights import Target, locate_merged
from vllm_omni.models.qwen_image.blocks import EPS, Block, BlockInputs, FinalLayer, StreamInputs
from vllm_omni.models.qwen_image.config import QwenImageConfig
from vllm_omni.models.qwen_image.positions import THETA, positions
from vllm_omni.worker.diffusion.joint import (
    Geometry,
    Group,
    JointTokens,
    grouped,
    packing_order,
    spans_of,
)
from vllm_omni.worker.diffusion.packing import Span
from vllm_omni.worker.diffusion.patches import PATCH, patchified, unpatchified
from vllm_omni.worker.diffusion.rope_tables import RopeTables
from vllm_omni.worker.diffusion.timestep import TimestepEmbedder

NUM_SINUSOIDS = 256


@dataclass(frozen=True, slots=True)
class Context:
    """What a row's picture attends to."""

    text: Tensor  # [T, D], from `encode_text`
    references: Tensor  # [n, D] of all references together, from `encode_references`
    grids: tuple[tuple[int, int], ...]  # height and width of each reference, in patches


class QwenImageTransformer(nn.Module):
    """Latents and their contexts -> velocities, for rows of any sizes; see the module's docstring."""

    def __init__(self, config: QwenImageConfig, shards: Shards = ALONE) -> None:
        """shards: this rank's share of `blocks`; what stands around them is whole."""
        super().__init__()
        self.config = config
        self.img_in = Linear(config.in_channels, config.dim)
        self.txt_norm = RMSNorm(config.joint_attention_dim, EPS)
        self.txt_in = Linear(config.joint_attention_dim, config.dim)
        self.time_embedder = TimestepEmbedder(NUM_SINUSOIDS, config.dim, bias=True)
        self.blocks = Blocks(Block(config, shards.tensor) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config)
        self._ropes = RopeTables(positions, config.axes_dims_rope, THETA)

    @property
    def device(self) -> torch.device:
        return self.txt_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.txt_norm.weight.dtype

    def encode_text(self, states: Tensor) -> Tensor:
        """[T, J] of the text encoder -> [T, D]."""
        return self.txt_in(self.txt_norm(states.to(self.txt_norm.weight)))

    def encode_references(self, latents: Sequence[Tensor]) -> Tensor:
        """[C, h, w] each -> [n, D] of all together, n being 0 where there are none."""
        if not latents:
            return self.txt_norm.weight.new_empty(0, self.config.dim)
        return self._embedded([patchified(reference[None], channels_first=True)[0] for reference in latents])

    def embed(self, latents: Sequence[Tensor], timesteps: Tensor, contexts: Sequence[Context]) -> JointTokens:
        """Rows before the first block. latents: [C, h, w] each; timesteps: [R] in 0 to 1000, 0 is clean."""
        geometries = [
            Geometry(len(context.text), (grid_of(latent), *context.grids))
            for latent, context in zip(latents, contexts, strict=True)
        ]
        order = packing_order(geometries)
        groups = grouped([geometries[row] for row in order])
        patches = [patchified(latents[row][None], channels_first=True)[0] for row in order]
        lengths, ones = [len(part) for part in patches], [1] * len(patches)
        with packed(order, lengths, ones):
            pictures = self._embedded(patches).split(lengths)
            vectors = self._vectors(timesteps[order])
        images = [
            part for row, picture in zip(order, pictures, strict=True) for part in (picture, contexts[row].references)
        ]
        text = torch.cat([contexts[row].text for row in order])
        return JointTokens(text, torch.cat(images), vectors, groups, tuple(order))

    def run_blocks(self, tokens: JointTokens, start: int, stop: int) -> JointTokens:
        """Blocks start .. stop - 1."""
        text, image, inputs = tokens.text, tokens.image, self._inputs(tokens)
        for block in self.blocks.present(start, stop):
            text, image = block(text, image, inputs)
        return replace(tokens, text=text, image=image)

    def read_tokens(self, plain: Any, tensors: Sequence[Tensor]) -> JointTokens:
        """See BlockStack."""
        return JointTokens.of_content(plain, tensors)

    def modulated_input(self, tokens: JointTokens) -> list[Tensor]:
        """[L, D] per packed row, text then image: what the first block attends with."""
        block: Block = next(self.blocks.present())  # type: ignore[assignment]
        text, image = block.modulated_input(tokens.text, tokens.image, self._inputs(tokens))
        return replace(tokens, text=text, image=image).per_row()

    def unembed(self, tokens: JointTokens) -> list[Tensor]:
        """Velocities [C, h, w] (noise minus clean latents), in the order of the rows that `embed` was given."""
        velocities: list[Tensor] = []
        rows = [group.rows for group in tokens.groups]
        lengths = [group.geometry.num_picture for group in tokens.groups for _ in range(group.num_rows)]
        with packed(range(len(lengths)), lengths, [1] * len(lengths)):
            found = self.final_layer(tokens.pictures(tokens.image), rows, tokens.condition)
        for patches, group in zip(found, tokens.groups, strict=True):
            velocities += unpatchified(patches, *group.geometry.grids[0], channels_first=True)
        placed = sorted(zip(tokens.order, velocities, strict=True), key=lambda pair: pair[0])
        return [velocity for _, velocity in placed]

    def _embedded(self, patches: Sequence[Tensor]) -> Tensor:
        """[n, 4 C] each -> [n, D] of all together."""
        return self.img_in(torch.cat(list(patches)).to(self.dtype))

    def _vectors(self, timesteps: Tensor) -> Tensor:
        """[R] -> [R, D], as modulation reads them."""
        return F.silu(self.time_embedder(timesteps))

    def _inputs(self, tokens: JointTokens) -> BlockInputs:
        spans = spans_of(tokens.groups, partial(self._ropes.of, device=tokens.text.device))
        text, image = StreamInputs(spans.text, tokens.condition), StreamInputs(spans.image, tokens.condition)
        if self.config.zero_cond_t and any(len(group.geometry.grids) > 1 for group in tokens.groups):
            resting = self._vectors(torch.zeros(len(tokens.condition), device=tokens.text.device))
            vectors = torch.stack([tokens.condition, resting], dim=1).flatten(0, 1)
            image = StreamInputs(resting_references(tokens.groups, spans.image), vectors)
        return BlockInputs(spans, text, image)

    def locate(self, name: str) -> Target | None:
        """Published name -> parameter here (see layers/weights.py)."""
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        return locate_merged(self, name, MERGED)

    def is_ignored(self, name: str) -> bool:
        return False


def grid_of(latents: Tensor) -> tuple[int, int]:
    """[C, h, w] -> height and width in patches."""
    return latents.shape[1] // PATCH, latents.shape[2] // PATCH


def resting_references(groups: Sequence[Group], spans: Sequence[Span]) -> list[Span]:
    """The spans of images, their references apart. Each row has two vectors then, which modulate its picture and its
    references.
    """
    apart: list[Span] = []
    for group, span in zip(groups, spans, strict=True):
        if len(group.geometry.grids) == 1:
            apart.append(replace(span, rows=slice(2 * span.rows.start, 2 * span.rows.stop, 2)))
            continue
        for index in range(span.num_rows):
            start, row = span.tokens.start + index * span.length, 2 * (span.rows.start + index)
            middle, stop = start + group.geometry.num_picture, start + span.length
            picture, references = span.rope.split([middle - start, stop - middle])
            apart.append(Span(slice(row, row + 1), slice(start, middle), 1, middle - start, picture))
            apart.append(Span(slice(row + 1, row + 2), slice(middle, stop), 1, stop - middle, references))
    return apart


MERGED = dict.fromkeys(("to_q", "to_k", "to_v"), "qkv")
RENAMED = (
    (r"^time_text_embed\.timestep_embedder\.", "time_embedder."),
    (r"^norm_out\.linear\.", "final_layer.modulation."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "blocks."),
    (r"\.img_mod\.1\.", ".image.modulation."),
    (r"\.txt_mod\.1\.", ".text.modulation."),
    (r"\.img_mlp\.net\.0\.proj\.", ".image.up."),
    (r"\.img_mlp\.net\.2\.", ".image.down."),
    (r"\.txt_mlp\.net\.0\.proj\.", ".text.up."),
    (r"\.txt_mlp\.net\.2\.", ".text.down."),
    (r"\.attn\.to_out\.0\.", ".image.out."),
    (r"\.attn\.to_add_out\.", ".text.out."),
    (r"\.attn\.to_([qkv])\.", r".image.to_\1."),
    (r"\.attn\.add_([qkv])_proj\.", r".text.to_\1."),
    (r"\.attn\.norm_added_([qk])\.", r".text.norm_\1."),
    (r"\.attn\.norm_([qk])\.", r".image.norm_\1."),
)
