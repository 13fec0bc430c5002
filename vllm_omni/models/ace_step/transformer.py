"""The ACE-Step 1.5 transformer (arXiv 2602.00744; published as diffusers' AceStepTransformer1DModel), for batches of
any mix of durations.

The tokens of all rows lie packed in one [N, D] tensor, without padding between rows. What the timestep does not touch
is computed once per request: the keys and values of every cross-attention (`encode_text`) and the half of the patch
embedding that belongs to the context (`encode_context`). Knows no sampler, no guidance and no cache.

Legend: R rows, N packed tokens of all rows, T latent frames of a row, P frames of a patch, L = ceil(T / P) tokens of a
row, D width, H query heads, K key-value heads, d head size, C latent channels, t text tokens, E text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.banded import attention, windowed_attention
from vllm_omni.layers.linear import Linear, MergedLinear, linear
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.rotary import rotary_frequencies
from vllm_omni.layers.weights import Target, load_weights
from vllm_omni.models.ace_step.config import SLIDING, AceStepConfig
from vllm_omni.models.ace_step.frames import Condition, Frames, Text, grouped, packed_order
from vllm_omni.models.z_image.packing import Span, joined, per_span

TIME_FREQUENCIES = 256
TIME_SCALE = 1000.0
FUSED = {
    "self_attn.to_q": "self_attn.qkv",
    "self_attn.to_k": "self_attn.qkv",
    "self_attn.to_v": "self_attn.qkv",
    "cross_attn.to_k": "cross_attn.keys_values",
    "cross_attn.to_v": "cross_attn.keys_values",
    "mlp.gate_proj": "mlp.gate_up",
    "mlp.up_proj": "mlp.gate_up",
}


class TimeEmbedding(nn.Module):
    """[R] in [0, 1] -> [R, D], and through one more layer [R, 6, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(TIME_FREQUENCIES, width)
        self.linear_2 = Linear(width, width)
        self.time_proj = Linear(width, 6 * width)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angles = time[:, None].float() * TIME_SCALE * torch.exp(-math.log(10000.0) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedding = self.linear_2(F.silu(self.linear_1(waves.to(self.linear_1.weight.dtype))))
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class SelfAttention(nn.Module):
    """Grouped-query attention within each row, with normalised queries and keys and rotary positions. window: how far a
    token sees to each side; None is everywhere.
    """

    def __init__(self, config: AceStepConfig, window: int | None) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, window
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = {"to_q": query, "to_k": key, "to_v": key}
        self.qkv = MergedLinear(config.hidden_size, parts, bias=config.attention_bias)
        self.out = Linear(query, config.hidden_size, bias=config.attention_bias)
        self.norm_q = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.project(x))
        query, key = self.norm_q(query), self.norm_k(key)  # [N, H, d] and [N, K, d]
        attended = [self._attend(query[s.tokens], key[s.tokens], value[s.tokens], s) for s in spans]
        return self.out(joined(attended))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, span: Span) -> Tensor:
        shape = (span.num_rows, span.length)
        query = rotated(query.unflatten(0, shape), span.rope).transpose(1, 2)  # [rows, H, L, d]
        key = rotated(key.unflatten(0, shape), span.rope).transpose(1, 2)
        value = value.unflatten(0, shape).transpose(1, 2)
        if self.window is None:
            attended = attention(query, key, value)
        else:
            attended = windowed_attention(query, key, value, self.window)
        return attended.transpose(1, 2).flatten(0, 1).flatten(1)


class CrossAttention(nn.Module):
    """Every token of a row reads the row's text; no positions."""

    def __init__(self, config: AceStepConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.to_q = Linear(config.hidden_size, query, bias=config.attention_bias)
        self.keys_values = MergedLinear(config.hidden_size, {"to_k": key, "to_v": key}, bias=config.attention_bias)
        self.out = Linear(query, config.hidden_size, bias=config.attention_bias)
        self.norm_q = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.rms_norm_eps)

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[t, D] -> keys and values, [1, K, t, d] each."""
        key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.keys_values.project(states))
        return self.norm_k(key).transpose(0, 1)[None].contiguous(), value.transpose(0, 1)[None].contiguous()

    def forward(self, x: Tensor, readings: Sequence[tuple[slice, Text]], layer: int) -> Tensor:
        query = self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim))).transpose(0, 1)[None]  # [1, H, N, d]
        attended = [attention(query[:, :, tokens], *text.layers[layer])[0] for tokens, text in readings]
        return self.out((attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)).transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: AceStepConfig) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up = MergedLinear(config.hidden_size, parts)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.project(x)
        return self.down_proj(F.silu(gate).mul_(up))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a norm; the first and the last shifted, scaled and
    gated by the timestep.
    """

    def __init__(self, config: AceStepConfig, index: int) -> None:
        super().__init__()
        self.index = index
        window = config.sliding_window if config.layer_types[index] == SLIDING else None
        self.self_attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, window)
        self.cross_attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, config.hidden_size))

    def forward(
        self, x: Tensor, spans: Sequence[Span], readings: Sequence[tuple[slice, Text]], modulation: Tensor
    ) -> Tensor:
        rows = self.scale_shift_table + modulation  # [R, 6, D]: shift, scale, gate of attention, then of feed-forward
        normed = per_span(modulated, spans, self.self_attn_norm(x), row=rows[:, 0:2])
        x = per_span(gated, spans, x, self.self_attn(normed, spans), row=rows[:, 2])
        x = x + self.cross_attn(self.cross_attn_norm(x), readings, self.index)
        normed = per_span(modulated, spans, self.mlp_norm(x), row=rows[:, 3:5])
        return per_span(gated, spans, x, self.mlp(normed), row=rows[:, 5])


def modulated(x: Tensor, shift_scale: Tensor) -> Tensor:
    """x: [rows, L, D]; shift_scale: [rows, 1, 2, D]."""
    shift, scale = shift_scale.unbind(2)
    return torch.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, update)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates [rows, L, H, d] by rope [L, d / 2, 2], in float32; the halves of the last axis are the real and the
    imaginary part.
    """
    real, imaginary = x.float().chunk(2, dim=-1)
    cos, sin = rope[:, None].unbind(-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).to(x.dtype)


class AceStepTransformer(nn.Module):
    """latents, timesteps and conditions -> velocities (noise minus clean latents), for rows of any durations. Made by
    `load`; see the module's docstring.
    """

    context_in: Tensor
    noise_in: Tensor
    frames_out: Tensor
    frames_out_bias: Tensor
    still_embedding: Tensor
    still_modulation: Tensor

    def __init__(self, config: AceStepConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, patch = config.hidden_size, config.audio_acoustic_hidden_dim, config.patch_size
        self.proj_in_conv = nn.Conv1d(3 * channels, width, kernel_size=patch, stride=patch)
        self.time_embed = TimeEmbedding(width)
        self.time_embed_r = TimeEmbedding(width)
        self.condition_embedder = Linear(config.encoder_hidden_size, width)
        self.blocks = [Block(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(self.blocks)
        self.norm_out = RMSNorm(width, config.rms_norm_eps)
        self.proj_out_conv = nn.ConvTranspose1d(width, channels, kernel_size=patch, stride=patch)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, width))
        self._rope = torch.empty(0)

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> AceStepTransformer:
        """The model of a `transformer` folder, ready to run."""
        with torch.device("meta"):
            model = cls(AceStepConfig.from_folder(folder))
        model.to_empty(device=device).to(dtype).requires_grad_(False).eval()
        load_weights(model, folder)
        model.settle()
        return model

    @torch.no_grad()
    def settle(self) -> None:
        """Folds what no request changes. A convolution over whole patches becomes a matrix, its context half apart; the
        embedding of t - r becomes a constant, since a sampler without mean flow has r = t.
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

    def encode_text(self, states: Tensor) -> Text:
        """[t, E] states of the condition encoder -> what cross-attention reads; the same for every step."""
        states = self.condition_embedder(states.to(self.condition_embedder.weight.dtype))
        return Text(tuple(block.cross_attn.encode(states) for block in self.blocks))

    def encode_context(self, context: Tensor) -> Tensor:
        """[T, 2 C] source latents and mask -> [L, D], the part of the embedded input that no step changes."""
        patches = self._patches(context.to(self.context_in.dtype))
        return linear(patches, self.context_in, _bias(self.proj_in_conv))

    def begin(self, latents: Sequence[Tensor], timesteps: Tensor, conditions: Sequence[Condition]) -> Frames:
        """Embeds rows. latents: [T, C] each; timesteps: [R] in [0, 1], 1 is noise."""
        lengths = [len(condition.context) for condition in conditions]
        order = packed_order(lengths, [condition.text for condition in conditions])
        rows = torch.cat([self._patches(latents[row].to(self.noise_in.dtype)) for row in order])
        context = joined([conditions[row].context for row in order])
        embedding, modulation = self.time_embed(timesteps[list(order)])
        return Frames(
            hidden=context + linear(rows, self.noise_in),
            embedding=embedding + self.still_embedding,
            modulation=modulation + self.still_modulation,
            groups=grouped([lengths[row] for row in order]),
            texts=tuple(conditions[row].text for row in order),
            num_frames=tuple(len(latents[row]) for row in order),
            order=order,
        )

    def run_blocks(self, frames: Frames, start: int, stop: int) -> Frames:
        """Blocks start .. stop - 1."""
        hidden, spans, readings = frames.hidden, frames.spans(self._rope_table(frames)), frames.readings()
        for block in self.blocks[start:stop]:
            hidden = block(hidden, spans, readings, frames.modulation)
        return replace(frames, hidden=hidden)

    def finish(self, frames: Frames) -> list[Tensor]:
        """Velocities [T, C], in the order of the rows that `begin` was given."""
        rows = self.scale_shift_table + frames.embedding[:, None]
        spans = frames.spans(self._rope_table(frames))
        normed = per_span(modulated, spans, self.norm_out(frames.hidden), row=rows)
        patches = linear(normed, self.frames_out, self.frames_out_bias).split(frames.lengths)
        channels = self.config.audio_acoustic_hidden_dim
        placed = dict(zip(frames.order, zip(patches, frames.num_frames, strict=True), strict=True))
        return [
            patch.reshape(-1, channels)[:count] for patch, count in (placed[row] for row in range(len(frames.order)))
        ]

    def forward(self, latents: Sequence[Tensor], timesteps: Tensor, conditions: Sequence[Condition]) -> list[Tensor]:
        """All of the above in one go."""
        return self.finish(self.run_blocks(self.begin(latents, timesteps, conditions), 0, len(self.layers)))

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
