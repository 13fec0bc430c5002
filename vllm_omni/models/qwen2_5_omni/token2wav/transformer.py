"""The transformer of Qwen2.5-Omni's token2wav: codes and a voice become a mel spectrogram, by a flow from noise.

Attention is blockwise: a frame sees its own block, and in some layers one block before or behind it, so it is computed
block by block with the neighbours that the layer has, and time and memory grow with the length. Only the first head
has rotary positions, as it was trained. What no timestep touches, the input projection of codes and voice, is computed
once per request. Knows no sampler and no guidance.

Legend: R rows, B blocks of all rows, S frames of a block, N frames of all rows, T frames of a row, n codes of a row,
D width, H heads, d head size, M mel bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.banded import attention
from vllm_omni.layers.ecapa import EcapaEncoder
from vllm_omni.layers.linear import Linear, MergedLinear
from vllm_omni.layers.modulation import gated_sum, modulated
from vllm_omni.layers.norm import LayerNorm
from vllm_omni.layers.rotary import rotary_frequencies
from vllm_omni.layers.weights import Target
from vllm_omni.models.qwen2_5_omni.speakers import Speaker
from vllm_omni.models.qwen2_5_omni.token2wav.blocks import Blocks, Layout, RowSpan, View
from vllm_omni.models.qwen2_5_omni.token2wav.config import DiTConfig

TIME_FREQUENCIES = 256
TIME_SCALE = 1000.0
NORM_EPS = 1e-6
NULL_CODE = 0  # what the unguided branch reads instead of the codes
PLACES = {
    "attn_norm.linear": "modulation",
    "attn.to_out.0": "attn.out",
    "ff.ff.0": "ff_in",
    "ff.ff.3": "ff_out",
    "time_mlp.0": "linear_1",
    "time_mlp.2": "linear_2",
    "text_embed.codec_embed": "codec_embed",
    "input_embed.": "",
    "transformer_blocks": "layers",
    "norm_out.linear": "modulation_out",
}


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """What a speaker adds to the embedded input of every frame, [D]."""

    guided: Tensor
    null: Tensor  # the unguided branch's, codes included


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """What one row is given besides its latents."""

    context: Tensor  # [T, D], the part of the embedded input that no step changes
    start: int  # the row's first frame, counted from the beginning of the speech


class TimeEmbedding(nn.Module):
    """[R] in [0, 1] -> [R, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(TIME_FREQUENCIES, width)
        self.linear_2 = Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) * (-math.log(10000.0) / (half - 1))
        angles = TIME_SCALE * time[:, None] * exponents.exp()
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.sin(), angles.cos()], dim=-1))))


class BlockAttention(nn.Module):
    """Every frame attends to the frames of the blocks in view; its first head knows positions."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.qkv = MergedLinear(config.hidden_size, {"to_q": width, "to_k": width, "to_v": width}, bias=True)
        self.out = Linear(width, config.hidden_size)

    def forward(self, x: Tensor, view: View, rope: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.project(x))  # [B, S, H, d]
        for states in (query, key):
            states[:, :, 0] = rotated(states[:, :, 0], rope)
        if not view.is_own_block:
            key, value = (states[view.blocks].flatten(1, 2) for states in (key, value))  # [B, W S, H, d]
        attended = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), view.mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and feed-forward, both shifted, scaled and gated by the timestep. reach: blocks seen back and ahead."""

    def __init__(self, config: DiTConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.reach = (int(index in config.look_backward_layers), int(index in config.look_ahead_layers))
        self.norm = LayerNorm(NORM_EPS)
        self.modulation = Linear(width, 6 * width)
        self.attn = BlockAttention(config)
        self.ff_in = Linear(width, width * config.ff_mult)
        self.ff_out = Linear(width * config.ff_mult, width)

    def forward(self, x: Tensor, blocks: Blocks) -> Tensor:
        modulation = self.modulation(blocks.time)[blocks.layout.row_of_block, None]  # [B, 1, 6 D]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)
        view = blocks.layout.views[self.reach]
        x = gated_sum(x, self.attn(modulated(x, self.norm, scale, shift), view, blocks.rope), gate)
        hidden = F.gelu(self.ff_in(modulated(x, self.norm, scale_ff, shift_ff)), approximate="tanh")
        return gated_sum(x, self.ff_out(hidden), gate_ff)


class Token2WavTransformer(nn.Module):
    """Latents, timesteps and conditions -> velocities (clean minus noise), for rows of any lengths."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.time_embed = TimeEmbedding(width)
        self.codec_embed = nn.Embedding(config.num_embeds + 1, config.emb_dim)
        self.spk_encoder = EcapaEncoder(config)
        self.proj = nn.Linear(config.mel_dim + config.enc_dim + config.emb_dim + config.enc_emb_dim, width)
        self.blocks = [Layer(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(self.blocks)
        self.reaches = {layer.reach for layer in self.blocks}
        self.norm_out = LayerNorm(NORM_EPS)
        self.modulation_out = Linear(width, 2 * width)
        self.proj_out = Linear(width, config.mel_dim)
        self._frequencies, _ = rotary_frequencies(config.head_dim, 0, {"rope_theta": config.rope_theta})

    def encode_voice(self, speaker: Speaker) -> Voice:
        """Once per voice. The unguided branch has a silent reference and no speaker vector."""
        _, reference_in, code_in, speaker_in = self._inputs()
        device = self.proj.weight.device
        mel, vector = speaker.ref_mel.to(device), speaker.cond.to(device)
        guided = F.linear(self.spk_encoder(mel), reference_in, self.proj.bias) + F.linear(vector, speaker_in)
        null = F.linear(self.spk_encoder(torch.zeros_like(mel)), reference_in, self.proj.bias)
        return Voice(guided, null + F.linear(self.codec_embed.weight[NULL_CODE], code_in))

    def encode_codes(self, codes: Tensor, voice: Voice) -> Tensor:
        """[n] int64 -> the context [T, D] of the guided branch; the other one's is `voice.null` at every frame."""
        embedded = F.linear(self.codec_embed(codes), self._inputs()[2]) + voice.guided
        return embedded.repeat_interleave(self.config.repeats, dim=0)

    def embed(self, latents: Sequence[Tensor], timesteps: Tensor, conditions: Sequence[Condition]) -> Blocks:
        """Rows of frames [T, M], each at its own timestep [R]."""
        rows = [RowSpan(condition.start, len(row)) for row, condition in zip(latents, conditions, strict=True)]
        layout = Layout.of(rows, self.config.block_size, self.reaches, timesteps.device)
        context = torch.cat([condition.context for condition in conditions])
        hidden = layout.placed(context + F.linear(torch.cat(list(latents)), self._inputs()[0]))
        angles = layout.positions[..., None].float() * self._frequencies.to(timesteps.device)
        rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return Blocks(hidden, F.silu(self.time_embed(timesteps)), rope, layout, tuple(range(len(rows))))

    def run_blocks(self, blocks: Blocks, start: int, stop: int) -> Blocks:
        """Layers start .. stop - 1."""
        hidden = blocks.hidden
        for layer in self.blocks[start:stop]:
            hidden = layer(hidden, blocks)
        return replace(blocks, hidden=hidden)

    def unembed(self, blocks: Blocks) -> list[Tensor]:
        """Velocities [T, M], in the order of the rows that `embed` was given."""
        rows = self.modulation_out(blocks.time)[blocks.layout.row_of_block, None]
        scale, shift = rows.chunk(2, dim=-1)
        return blocks.layout.taken(self.proj_out(modulated(blocks.hidden, self.norm_out, scale, shift)))

    def locate(self, name: str) -> Target | None:
        """Published name -> parameter here (see layers/weights.py)."""
        for published, ours in PLACES.items():
            name = name.replace(published, ours)
        owner, _, kind = name.rpartition(".")
        prefix, _, part = owner.rpartition(".")
        if part not in ("to_q", "to_k", "to_v"):
            return Target(name)
        try:
            merged = self.get_submodule(f"{prefix}.qkv")
        except AttributeError:
            return None
        return Target(f"{prefix}.qkv.{kind}", merged.rows(part)) if isinstance(merged, MergedLinear) else None

    def _inputs(self) -> tuple[Tensor, ...]:
        """The input projection's columns: of the latents, the reference audio's vector, the code, the speaker."""
        config = self.config
        return self.proj.weight.split([config.mel_dim, config.enc_dim, config.emb_dim, config.enc_emb_dim], dim=1)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """[B, S, d], neighbouring numbers being real and imaginary part, by rope [B, S, d / 2, 2]."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.unbind(-1)
    return torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).flatten(-2)
