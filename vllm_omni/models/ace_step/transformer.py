"""The ACE-Step 1.5 transformer (arXiv 2602.00744; published as diffusers' AceStepTransformer1DModel), for batches of
any mix of durations.

The tokens of all rows lie packed in one [N, D] tensor, without padding between rows. What the timestep does not touch
is computed once per request: the keys and values of every cross-attention (`encode_text`) and the half of the patch
embedding that belongs to the context (`encode_context`). Knows no sampler, no guidance and no cache.

Legend: R rows, N packed tokens of all rows, T latent frames of a row, P frames of a patch, L = ceil(T / P) tokens of a
row, D width, H query heads, K key-value heads, d head size, C latent channels, t text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.blocks import Blocks
from vllm_omni.layers.linear import Linear, MergedLinear
from vllm_omni.layers.meta_device import on_meta_device
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.packing import linear
from vllm_omni.layers.rotary import rotary_frequencies
from vllm_omni.layers.weights import MakeCopies, Target, allocate, load_weights
from vllm_omni.models.ace_step.blocks import Block, TimeEmbedding
from vllm_omni.models.ace_step.config import AceStepConfig
from vllm_omni.models.ace_step.frames import Frames, RowCondition, grouped
from vllm_omni.worker.diffusion.cross_attention import CrossAttentionKV, packed_order
from vllm_omni.worker.diffusion.packing import joined, modulated_rows

FUSED = {
    "self_attn.to_q": "self_attn.qkv",
    "self_attn.to_k": "self_attn.qkv",
    "self_attn.to_v": "self_attn.qkv",
    "cross_attn.to_k": "cross_attn.keys_values",
    "cross_attn.to_v": "cross_attn.keys_values",
    "mlp.gate_proj": "mlp.gate_up",
    "mlp.up_proj": "mlp.gate_up",
}


class AceStepTransformer(nn.Module):
    """latents, timesteps and conditions -> velocities (noise minus clean latents), for rows of any durations. Made by
    `load`; see the module's docstring.
    """

    context_in: Tensor  # [D, P 2 C], the patch embedding of source latents and mask
    noise_in: Tensor  # [D, P C], the patch embedding of noisy latents
    frames_out: Tensor  # [P C, D]
    frames_out_bias: Tensor  # [P C]
    still_embedding: Tensor  # [1, D], of the timestep difference 0
    still_modulation: Tensor  # [1, 6, D], likewise

    def __init__(self, config: AceStepConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, patch = config.hidden_size, config.audio_acoustic_hidden_dim, config.patch_size
        self.proj_in_conv = nn.Conv1d(3 * channels, width, kernel_size=patch, stride=patch)
        self.time_embed = TimeEmbedding(width)
        self.time_embed_r = TimeEmbedding(width)
        self.condition_embedder = Linear(config.encoder_hidden_size, width)
        self.layers = Blocks(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm_out = RMSNorm(width, config.rms_norm_eps)
        self.proj_out_conv = nn.ConvTranspose1d(width, channels, kernel_size=patch, stride=patch)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, width))
        self._rope = torch.empty(0)

    @classmethod
    def load(
        cls,
        folder: Path,
        config: AceStepConfig,
        device: torch.device,
        dtype: torch.dtype,
        weights_variant: str | None = None,
        quantization: str | None = None,
        make_copies: MakeCopies | None = None,
    ) -> AceStepTransformer:
        """The model of a `transformer` folder and its configuration, ready to run."""
        model = cls.build(config)
        allocate(model, device, dtype, quantization, make_copies)
        load_weights(model, folder, variant=weights_variant)
        model.fold_weights()
        return model

    @classmethod
    def build(cls, config: AceStepConfig) -> AceStepTransformer:
        """On the meta device."""
        with on_meta_device():
            return cls(config)

    @torch.no_grad()
    def fold_weights(self) -> None:
        """Computes once what no request changes. A convolution over whole patches becomes a matrix, its context half
        apart; the embedding of t - r becomes a constant, since a sampler without mean flow has r = t.
        """
        context = self.config.context_channels
        by_patch = self.proj_in_conv.weight.transpose(1, 2)  # [D, P, 3 C]
        embedding, modulation = self.time_embed_r(torch.zeros(1, device=by_patch.device))
        folded = {
            "context_in": by_patch[:, :, :context].flatten(1),
            "noise_in": by_patch[:, :, context:].flatten(1),
            "frames_out": self.proj_out_conv.weight.permute(2, 1, 0).flatten(0, 1),  # [P C, D]
            "frames_out_bias": _bias(self.proj_out_conv).repeat(self.config.patch_size),
            "still_embedding": embedding,
            "still_modulation": modulation,
        }
        for name, tensor in folded.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        del self.time_embed_r

    def encode_text(self, states: Tensor) -> CrossAttentionKV:
        """[t, E] states of the condition encoder -> what cross-attention reads; the same for every step."""
        states = self.condition_embedder(states.to(self.condition_embedder.weight.dtype))
        return CrossAttentionKV(tuple(block.cross_attn.encode(states) for block in self._present()))

    def encode_context(self, context: Tensor) -> Tensor:
        """[T, 2 C] source latents and mask -> [L, D], the part of the embedded input that no step changes."""
        patches = self._patches(context.to(self.context_in.dtype))
        return linear(patches, self.context_in, _bias(self.proj_in_conv))

    def embed(self, latents: Sequence[Tensor], timesteps: Tensor, conditions: Sequence[RowCondition]) -> Frames:
        """Rows before the first block. latents: [T, C] each; timesteps: [R] in [0, 1], 1 is noise."""
        lengths = [len(condition.context) for condition in conditions]
        reads = [condition.cross_attention for condition in conditions]
        order = packed_order(lengths, reads)
        rows = torch.cat([self._patches(latents[row].to(self.noise_in.dtype)) for row in order])
        context = joined([conditions[row].context for row in order])
        embedding, modulation = self.time_embed(timesteps[list(order)])
        return Frames(
            hidden=context + linear(rows, self.noise_in),
            embedding=embedding + self.still_embedding,
            modulation=modulation + self.still_modulation,
            groups=grouped([lengths[row] for row in order]),
            cross_attention=tuple(reads[row] for row in order),
            num_frames=tuple(len(latents[row]) for row in order),
            order=order,
        )

    def run_blocks(self, frames: Frames, start: int, stop: int) -> Frames:
        """Blocks start .. stop - 1."""
        hidden, spans, reads = frames.hidden, frames.spans(self._rope_table(frames)), frames.cross_attention_spans()
        for block in self._present(start, stop):
            hidden = block(hidden, spans, reads, frames.modulation)
        return replace(frames, hidden=hidden)

    def modulated_input(self, frames: Frames) -> list[Tensor]:
        """[L, D] per packed row: what the first block's self-attention reads."""
        spans = frames.spans(self._rope_table(frames))
        block = next(self._present())
        return replace(frames, hidden=block.modulated_input(frames.hidden, spans, frames.modulation)).per_row()

    def unembed(self, frames: Frames) -> list[Tensor]:
        """Velocities [T, C], in the order of the rows that `embed` was given."""
        # 1 patches of the packed rows
        rows = self.scale_shift_table + frames.embedding[:, None]
        spans = frames.spans(self._rope_table(frames))
        normed = modulated_rows(frames.hidden, self.norm_out, spans, rows[:, 1], rows[:, 0])
        patches = linear(normed, self.frames_out, self.frames_out_bias).split(frames.lengths)
        # 2 frames, in the caller's order and without what fills up the last patch
        channels = self.config.audio_acoustic_hidden_dim
        placed = dict(zip(frames.order, zip(patches, frames.num_frames, strict=True), strict=True))
        return [
            patch.reshape(-1, channels)[:count] for patch, count in (placed[row] for row in range(len(frames.order)))
        ]

    def forward(self, latents: Sequence[Tensor], timesteps: Tensor, conditions: Sequence[RowCondition]) -> list[Tensor]:
        """All of the above in one go."""
        return self.unembed(self.run_blocks(self.embed(latents, timesteps, conditions), 0, len(self.layers)))

    def _present(self, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        return cast(Iterator[Block], self.layers.present(start, stop))

    def _patches(self, rows: Tensor) -> Tensor:
        """[T, channels] -> [L, P channels], the last patch filled up with zeros."""
        missing = self.config.num_tokens(len(rows)) * self.config.patch_size - len(rows)
        return F.pad(rows, (0, 0, 0, missing)).view(-1, self.config.patch_size * rows.shape[1])

    def _rope_table(self, frames: Frames) -> Tensor:
        """[at least the longest row, d / 2, 2] cosines and sines, float32."""
        longest = max(group.length for group in frames.groups)
        if len(self._rope) < longest or self._rope.device != frames.hidden.device:
            frequencies, _ = rotary_frequencies(self.config.head_dim, longest, {"rope_theta": self.config.rope_theta})
            angles = torch.arange(2 * longest, dtype=torch.float32)[:, None] * frequencies
            self._rope = torch.stack([angles.cos(), angles.sin()], dim=-1).to(frames.hidden.device)
        return self._rope

    def locate(self, name: str) -> Target | None:
        """Published name -> parameter here (see layers/weights.py)."""
        owner, _, kind = name.replace(".to_out.0.", ".out.").rpartition(".")
        prefix, _, part = owner.rpartition(".")
        prefix, _, parent = prefix.rpartition(".")
        if f"{parent}.{part}" not in FUSED:
            return Target(f"{owner}.{kind}" if owner else name)
        owner = f"{prefix}.{FUSED[f'{parent}.{part}']}"
        try:
            merged = self.get_submodule(owner)
        except AttributeError:
            return None
        return Target(f"{owner}.{kind}", merged.rows(part)) if isinstance(merged, MergedLinear) else None

    def is_ignored(self, name: str) -> bool:
        return False


def _bias(convolution: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
    assert convolution.bias is not None, "both projections have one"
    return convolution.bias
