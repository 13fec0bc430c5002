"""Attention on the block grid equals attention under one mask over everything, wherever rows start and end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_omni.models.qwen2_5_omni.token2wav.blocks import Blocks, Layout, RowSpan
from vllm_omni.models.qwen2_5_omni.token2wav.config import DiTConfig
from vllm_omni.models.qwen2_5_omni.token2wav.transformer import BlockAttention, rotated

CPU, SIZE, WIDTH = torch.device("cpu"), 4, 8
REACHES = {(0, 0), (1, 0), (0, 1), (1, 1)}
spans = st.lists(st.builds(RowSpan, st.integers(0, 11), st.integers(1, 13)), min_size=1, max_size=4)


def plain_attention(module: BlockAttention, x: Tensor, row: RowSpan, reach: tuple[int, int], rope: Tensor) -> Tensor:
    """One row [T, D] with a [T, T] mask."""
    query, key, value = (part.unflatten(-1, (-1, module.head_dim)) for part in module.qkv.project(x))
    heads = [
        torch.cat([rotated(states[None, :, 0], rope[None])[0][:, None], states[:, 1:]], 1) for states in (query, key)
    ]
    block = torch.arange(row.start, row.start + row.num_frames) // SIZE
    distance = block - block[:, None]
    mask = (distance >= -reach[0]) & (distance <= reach[1])
    shaped = [states.transpose(0, 1)[None] for states in (*heads, value)]
    attended = F.scaled_dot_product_attention(*shaped, attn_mask=mask)
    return module.out(attended[0].transpose(0, 1).flatten(1))


@settings(max_examples=40, deadline=None)
@given(spans, st.sampled_from(sorted(REACHES)))
@torch.no_grad()
def test_block_by_block_equals_one_mask_over_everything(rows: list[RowSpan], reach: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = BlockAttention(DiTConfig(hidden_size=WIDTH, num_attention_heads=2, head_dim=6))
    layout = Layout.of(rows, SIZE, REACHES, CPU)
    frames = [torch.randn(row.num_frames, WIDTH) for row in rows]
    angles = layout.positions[..., None] * torch.tensor([1.0, 0.3, 0.1])
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    got = layout.taken(module(layout.placed(torch.cat(frames)), layout.views[reach], rope))
    for x, row, result in zip(frames, rows, got, strict=True):
        positions = torch.arange(row.start, row.start + row.num_frames)[:, None] * torch.tensor([1.0, 0.3, 0.1])
        own = torch.stack([positions.cos(), positions.sin()], dim=-1)
        expected = plain_attention(module, x, row, reach, own)
        assert (result - expected).abs().max() <= 1e-5


@settings(max_examples=40, deadline=None)
@given(spans, st.randoms(use_true_random=False))
def test_what_is_placed_is_taken_back_and_chosen_rows_are_the_same_rows(rows: list[RowSpan], random: object) -> None:
    layout = Layout.of(rows, SIZE, REACHES, CPU)
    frames = [torch.full((row.num_frames, 2), float(index)) for index, row in enumerate(rows)]
    rope = layout.positions[..., None, None].expand(-1, -1, 1, 2).float()
    order = tuple(range(len(rows)))
    blocks = Blocks(layout.placed(torch.cat(frames)), torch.eye(len(rows)), rope, layout, order)
    assert all(torch.equal(a, b) for a, b in zip(blocks.per_row(), frames, strict=True))
    chosen = [index for index in order if random.random() < 0.7] or [0]  # type: ignore[attr-defined]
    part = blocks.select(chosen)
    assert part.order == tuple(chosen) and torch.equal(part.time, blocks.time[chosen])
    assert all(torch.equal(a, frames[index]) for a, index in zip(part.per_row(), chosen, strict=True))
    assert torch.equal(part.rope[:, :, 0, 0], part.layout.positions.float())
    doubled = part.with_rows([2 * row for row in part.per_row()])
    assert torch.equal(doubled.hidden, 2 * part.hidden)
