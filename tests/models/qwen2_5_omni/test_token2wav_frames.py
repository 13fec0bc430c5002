"""Attention to blocks equals attention under one mask over everything, wherever rows start and end; layers by one call
of the kernels equal the same part by part, to the last bit; chosen rows are the same rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.speech import TOKEN2WAV, save_tiny_omni, tiny_config
from support.token2wav import codes, engine, params, reference_sound, sound
from torch import Tensor

from vllm_omni.layers.band import Band
from vllm_omni.layers.linear import pack_linears
from vllm_omni.layers.native import library
from vllm_omni.models.qwen2_5_omni.token2wav.config import DiTConfig
from vllm_omni.models.qwen2_5_omni.token2wav.frames import Frames, RowSpan
from vllm_omni.models.qwen2_5_omni.token2wav.transformer import BlockAttention, Condition, Token2WavTransformer
from vllm_omni.worker.diffusion.packing import Span
from vllm_omni.worker.diffusion.rope_tables import turns

SIZE, WIDTH = 4, 8
CONFIG = DiTConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=32,
    emb_dim=16,
    block_size=SIZE,
    look_ahead_layers=(1,),
    look_backward_layers=(0, 2),
    num_embeds=59,
    mel_dim=20,
    enc_emb_dim=12,
    enc_dim=16,
    enc_channels=(16, 16, 16, 16, 48),
    enc_attention_channels=8,
    enc_se_channels=8,
)
WIDE = {"dit_config": {**TOKEN2WAV["dit_config"], "hidden_size": 64, "head_dim": 32}}
row_spans = st.lists(st.builds(RowSpan, st.integers(0, 11), st.integers(1, 40)), min_size=1, max_size=4)


def plain_attention(module: BlockAttention, x: Tensor, row: RowSpan) -> Tensor:
    """One row [T, D] with a [T, T] mask."""
    size = module.shape.head_dim
    query, key, value = (part.unflatten(-1, (-1, size)) for part in module.qkv.project(x))
    positions = torch.arange(row.start, row.start + row.num_frames)
    angles = positions[:, None] * 100.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)
    heads = []
    for states in (query, key):
        first = torch.view_as_real(torch.view_as_complex(states[:, 0].unflatten(-1, (-1, 2)).contiguous()) * turn)
        heads.append(torch.cat([first.flatten(-2)[:, None], states[:, 1:]], dim=1))
    block = positions // module.band.block
    distance = block - block[:, None]
    mask = (distance >= -module.band.back) & (distance <= module.band.ahead)
    shaped = [states.transpose(0, 1)[None] for states in (*heads, value)]
    attended = F.scaled_dot_product_attention(*shaped, attn_mask=mask)
    return module.out(attended[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("head_dim", [6, 32])
@settings(max_examples=40, deadline=None)
@given(row_spans, st.sampled_from([(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)]))
@torch.inference_mode()
def test_attention_to_blocks_equals_one_mask_over_everything(
    head_dim: int, rows: list[RowSpan], reach: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    config = DiTConfig(hidden_size=WIDTH, num_attention_heads=2, head_dim=head_dim)
    module = BlockAttention(config, Band(*reach, SIZE))
    frames = [torch.randn(row.num_frames, WIDTH) for row in rows]
    spans, start = [], 0
    for index, row in enumerate(rows):
        positions = torch.arange(row.start, row.start + row.num_frames)[:, None]
        tokens, rope = slice(start, start + row.num_frames), turns(positions, (head_dim,), 100.0)
        spans.append(Span(slice(index, index + 1), tokens, 1, row.num_frames, rope, row.start % SIZE))
        start = tokens.stop
    got = module(torch.cat(frames), spans).split([row.num_frames for row in rows])
    for x, row, result in zip(frames, rows, got, strict=True):
        assert (result - plain_attention(module, x, row)).abs().max() <= 1e-5


def make_transformer(dtype: torch.dtype = torch.float32) -> Token2WavTransformer:
    torch.manual_seed(1)
    transformer = Token2WavTransformer(CONFIG).requires_grad_(False)
    transformer.layers.to(dtype)
    pack_linears(transformer)
    return transformer


def embedded(transformer: Token2WavTransformer, rows: list[RowSpan]) -> Frames:
    latents = [torch.randn(row.num_frames, CONFIG.mel_dim) for row in rows]
    conditions = [Condition(torch.randn(row.num_frames, CONFIG.hidden_size), row.start) for row in rows]
    return transformer.embed(latents, [0.1 * index for index in range(len(rows))], conditions)


@settings(max_examples=20, deadline=None)
@given(row_spans, st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from([torch.float32, torch.bfloat16]))
@torch.inference_mode()
def test_layers_by_one_call_equal_their_parts(rows: list[RowSpan], part: tuple[int, int], dtype: torch.dtype) -> None:
    transformer, (start, stop) = make_transformer(dtype), sorted(part)
    frames = embedded(transformer, rows)
    assert (transformer.native() is None) == (not library.built_variants())
    whole = transformer.run_blocks(frames, start, stop).hidden
    transformer._native = None
    assert torch.equal(whole, transformer.run_blocks(frames, start, stop).hidden)


def test_the_waveform_is_the_reference_s_by_one_call_too(tmp_path: Path) -> None:
    config = {**TOKEN2WAV, **WIDE}
    stage = engine(save_tiny_omni(tmp_path, config=tiny_config(token2wav_config=config)))
    assert (stage.model.transformer.native() is None) == (not library.built_variants())
    for length in (1, 3, 17, 50):
        rows, value = codes(length, seed=length), params(5, 0.5, seed=length)
        got, expected = sound(stage, rows, value), reference_sound(rows, value, token2wav_config=config)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


@settings(max_examples=40, deadline=None)
@given(row_spans, st.randoms(use_true_random=False))
@torch.inference_mode()
def test_chosen_rows_are_the_same_rows(rows: list[RowSpan], random: object) -> None:
    transformer = make_transformer()
    frames = embedded(transformer, rows)
    assert [rows[row] for row in frames.order] == list(frames.rows) == sorted(rows)
    whole = transformer.run_blocks(frames, 0, 3)
    chosen = [row for row in range(len(rows)) if random.random() < 0.7] or [0]  # type: ignore[attr-defined]
    part = transformer.run_blocks(frames.select(chosen), 0, 3)
    assert part.order == tuple(frames.order[row] for row in chosen)
    for row, hidden in zip(chosen, part.per_row(), strict=True):
        torch.testing.assert_close(hidden, whole.per_row()[row])
    velocities = transformer.unembed(whole)
    assert [len(velocity) for velocity in velocities] == [row.num_frames for row in rows]
    doubled = part.with_rows([2 * row for row in part.per_row()])
    assert torch.equal(doubled.hidden, 2 * part.hidden)
    lengths = [rows[row].num_frames for row in sorted(part.order)]
    assert [len(velocity) for velocity in transformer.unembed(part)] == lengths


@torch.inference_mode()
def test_what_a_timestep_makes_is_kept_of_a_few() -> None:
    transformer = make_transformer()
    row = [RowSpan(0, 3)]
    first = embedded(transformer, row).modulations
    for step in range(200):
        transformer.embed([torch.zeros(3, 20)], [step / 200], [Condition(torch.zeros(3, 64), 0)])
        assert len(transformer._modulations) <= 64
    assert torch.equal(first, embedded(transformer, row).modulations)
