"""The transformer of Qwen2.5-Omni's token2wav: codes and a voice become a mel spectrogram, by a flow from noise.

Attention is blockwise: a frame sees its own block, and in some layers one block before or behind it, so that time and
memory grow with the length. Only the first head has rotary positions, as it was trained. What no timestep touches, the
input projection of codes and voice, is computed once per request; what nothing but the timestep touches, once for each
of the few that samplers ask for. Knows no sampler and no guidance.

Legend: R rows, N packed frames of all rows, T frames of a row, n codes of a row, D width, d head size, M mel bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.band import Band
from vllm_omni.layers.ecapa import EcapaEncoder
from vllm_omni.layers.heads import HeadShape, head_row
from vllm_omni.layers.linear import Linear, MergedLinear
from vllm_omni.layers.native.diffusion_blocks import BlockParts, NativeBlocks
from vllm_omni.layers.norm import LayerNorm
from vllm_omni.layers.weights import Target
from vllm_omni.models.qwen2_5_omni.speakers import Speaker
from vllm_omni.models.qwen2_5_omni.token2wav.config import DiTConfig
from vllm_omni.models.qwen2_5_omni.token2wav.frames import Frames, RowSpan
from vllm_omni.worker.diffusion.packing import Span, attended_rows, gated_rows, modulated_rows, runs
from vllm_omni.worker.diffusion.rope_tables import RopeTables

TIME_FREQUENCIES = 256
TIME_SCALE = 1000.0
NORM_EPS = 1e-6
MAX_TIMESTEPS = 64  # whose modulations are kept: a request has 36 of them, the same as any other's by default
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
    """Every frame attends to the frames of the blocks in its band; the first head alone knows positions."""

    def __init__(self, config: DiTConfig, band: Band) -> None:
        super().__init__()
        heads = config.num_attention_heads
        self.band = band
        self.shape = HeadShape(heads, heads, config.head_dim, are_neighbours=True, num_turned=1)
        width = heads * config.head_dim
        self.qkv = MergedLinear(config.hidden_size, {"to_q": width, "to_k": width, "to_v": width}, bias=True)
        self.out = Linear(width, config.hidden_size)

    def forward(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        return self.out(attended_rows(self.qkv(x), spans, self.shape, None, band=self.band))


class Layer(nn.Module):
    """Attention and feed-forward, both shifted, scaled and gated by the timestep."""

    def __init__(self, config: DiTConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        back, ahead = int(index in config.look_backward_layers), int(index in config.look_ahead_layers)
        self.norm = LayerNorm(NORM_EPS)
        self.modulation = Linear(width, 6 * width)
        self.attn = BlockAttention(config, Band(back, ahead, config.block_size))
        self.ff_in = Linear(width, width * config.ff_mult, activation="gelu")
        self.ff_out = Linear(width * config.ff_mult, width)

    def forward(self, x: Tensor, spans: Sequence[Span], modulation: Tensor) -> Tensor:
        """x: [N, D]; modulation: [R, 6, D] -> [N, D]."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.unbind(1)
        normed = modulated_rows(x, self.norm, spans, scale, shift)
        x = gated_rows(x, self.attn(normed, spans), spans, gate)
        normed = modulated_rows(x, self.norm, spans, scale_ff, shift_ff)
        return gated_rows(x, self.ff_out(self.ff_in(normed)), spans, gate_ff)

    def parts(self) -> BlockParts:
        """For kernels that run whole blocks."""
        linears = (self.attn.qkv, self.attn.out, self.ff_in, self.ff_out)
        return BlockParts((self.norm, None, self.norm, None), head_row(self.attn.shape, None), linears, self.attn.band)


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
        self.norm_out = LayerNorm(NORM_EPS)
        self.modulation_out = Linear(width, 2 * width)
        self.proj_out = Linear(width, config.mel_dim)
        self._ropes = RopeTables(_positions, (config.head_dim,), config.rope_theta)
        self._modulations: dict[float, tuple[Tensor, Tensor]] = {}  # by timestep
        self._native: NativeBlocks | Literal[False] | None = False

    @property
    def dtype(self) -> torch.dtype:
        """Of its layers; what stands before and behind them is float32."""
        return self.blocks[0].modulation.weight.dtype

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

    def embed(self, latents: Sequence[Tensor], timesteps: Sequence[float], conditions: Sequence[Condition]) -> Frames:
        """Rows of frames [T, M], each at its own timestep in [0, 1]."""
        rows = [RowSpan(condition.start, len(row)) for row, condition in zip(latents, conditions, strict=True)]
        order = sorted(range(len(rows)), key=lambda row: rows[row])
        weight = self._inputs()[0].T
        hidden = torch.cat([torch.addmm(conditions[row].context, latents[row], weight) for row in order])
        made = [self._modulations_at(timesteps[row]) for row in order]
        modulations, last = (torch.stack(list(parts), dim=-3) for parts in zip(*made, strict=True))
        return Frames(hidden.to(self.dtype), modulations, last, tuple(rows[row] for row in order), tuple(order))

    def run_blocks(self, frames: Frames, start: int, stop: int) -> Frames:
        """Layers start .. stop - 1."""
        spans, modulations, hidden = self._spans(frames), frames.modulations[start:stop], frames.hidden
        native = self.native()
        functions = None if native is None else native.functions(hidden, modulations)
        if native is not None and functions is not None:
            return replace(frames, hidden=native.run(functions, start, stop, hidden, spans, modulations))
        for layer, modulation in zip(self.blocks[start:stop], modulations, strict=True):
            hidden = layer(hidden, spans, modulation)
        return replace(frames, hidden=hidden)

    def native(self) -> NativeBlocks | None:
        """What runs all layers in one call; looked for once."""
        if self._native is False:
            self._native = NativeBlocks.find([layer.parts() for layer in self.blocks])
        return self._native

    def unembed(self, frames: Frames) -> list[Tensor]:
        """Velocities [T, M], in the order of the rows that `embed` was given."""
        scale, shift = frames.last_modulation.unbind(1)
        hidden = modulated_rows(frames.hidden.float(), self.norm_out, self._spans(frames), scale, shift)
        velocities = self.proj_out(hidden).split([row.num_frames for row in frames.rows])
        return [velocity for _, velocity in sorted(zip(frames.order, velocities, strict=True), key=itemgetter(0))]

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

    def _modulations_at(self, timestep: float) -> tuple[Tensor, Tensor]:
        """[layers, 6, D] of the layers, [2, D] behind them. The matrices that they are made by are two fifths of
        the layers' weights, so that what was made is kept.
        """
        made = self._modulations.get(timestep)
        if made is None:
            if len(self._modulations) >= MAX_TIMESTEPS:
                self._modulations.clear()
            time = torch.tensor([timestep], dtype=torch.float32, device=self.proj.weight.device)
            vector = F.silu(self.time_embed(time))
            of_layers = torch.cat([layer.modulation(vector.to(self.dtype)) for layer in self.blocks])
            last = self.modulation_out(vector)[0]
            made = of_layers.unflatten(-1, (6, -1)), last.unflatten(-1, (2, -1))
            self._modulations[timestep] = made
        return made

    def _spans(self, frames: Frames) -> list[Span]:
        """Neighbouring rows of one span, together."""
        found, start = [], 0
        for rows, row in runs(frames.rows):
            count = rows.stop - rows.start
            tokens = slice(start, start + count * row.num_frames)
            rope = self._ropes.of(row, frames.hidden.device)
            found.append(Span(rows, tokens, count, row.num_frames, rope, row.start % self.config.block_size))
            start = tokens.stop
        return found


def _positions(row: RowSpan) -> Tensor:
    """[T, 1]."""
    return torch.arange(row.start, row.start + row.num_frames)[:, None]
