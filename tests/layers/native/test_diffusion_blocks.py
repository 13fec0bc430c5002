"""Whole blocks of a diffusion transformer by one call equal the same blocks part by part, to the last bit; a row
depends on no other; what the call does not take goes part by part.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_omni.layers.linear import Linear, pack_linears, quantize_linears
from vllm_omni.layers.shard import ALONE
from vllm_omni.models.z_image.blocks import Block, Stack
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.worker.diffusion.packing import Span

NUM_BLOCKS, DIM, HEADS = 3, 192, 2
CONFIG = {
    "dim": DIM,
    "n_heads": HEADS,
    "n_layers": NUM_BLOCKS,
    "n_refiner_layers": 1,
    "in_channels": 16,
    "cap_feat_dim": 64,
}
NUMBERS = {
    "norm_eps": 1e-5,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 32, 32],
    "axes_lens": [64, 64, 64],
}
WIDTH = ZImageConfig.from_dict({**CONFIG, **NUMBERS, "qk_norm": True}).modulation_width
DTYPES = (torch.float32, torch.bfloat16)


def make_stack(
    dtype: torch.dtype, *, is_modulated: bool = True, qk_norm: bool = True, held: str | None = None
) -> Stack:
    config = ZImageConfig.from_dict({**CONFIG, **NUMBERS, "qk_norm": qk_norm})
    stack = Stack(Block(config, modulated=is_modulated, shards=ALONE) for _ in range(NUM_BLOCKS)).to(dtype)
    for name, weight in stack.named_parameters():
        weight.requires_grad_(False)
        if "norm" in name:
            weight.add_(0.2 * torch.randn_like(weight))
    if held is not None:
        published = {name: layer.weight for name, layer in stack.named_modules() if isinstance(layer, Linear)}
        quantize_linears(stack, held)
        for name, layer in stack.named_modules():
            if isinstance(layer, Linear) and layer.weight is not published[name]:
                layer.fill(slice(None), published[name], None)
    pack_linears(stack)
    return stack


def make_spans(shapes: Sequence[tuple[int, int]]) -> list[Span]:
    """shapes: rows and tokens of each."""
    spans, row, token = [], 0, 0
    for rows, length in shapes:
        angles = torch.randn(length, DIM // HEADS // 2)
        rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
        spans.append(Span(slice(row, row + rows), slice(token, token + rows * length), rows, length, rope))
        row, token = row + rows, token + rows * length
    return spans


def one_by_one(
    stack: Stack, x: Tensor, spans: Sequence[Span], condition: Tensor | None, start: int, stop: int
) -> Tensor:
    for block in list(stack)[start:stop]:
        x = block(x, spans, condition)
    return x


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 70)), min_size=1, max_size=3),
    *(st.booleans(), st.booleans()),
    st.sampled_from([(dtype, held) for dtype in DTYPES for held in (None, "int8")] + [(torch.float32, "bfloat16")]),
    st.tuples(st.integers(0, NUM_BLOCKS), st.integers(0, NUM_BLOCKS)),
    st.integers(0, 10**6),
)
@torch.inference_mode()
def test_whole_blocks_equal_their_parts(
    shapes: list[tuple[int, int]],
    is_modulated: bool,
    qk_norm: bool,
    numbers: tuple[torch.dtype, str | None],
    part: tuple[int, int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    dtype, held = numbers
    stack, spans = make_stack(dtype, is_modulated=is_modulated, qk_norm=qk_norm, held=held), make_spans(shapes)
    x = torch.randn(spans[-1].tokens.stop, DIM, dtype=dtype)
    condition = torch.randn(spans[-1].rows.stop, WIDTH, dtype=dtype) if is_modulated else None
    before, (start, stop) = x.clone(), sorted(part)
    assert stack.native() is not None
    found = stack.run(x, spans, condition, start, stop)
    assert torch.equal(found, one_by_one(stack, x, spans, condition, start, stop))
    assert torch.equal(x, before), "what is given stays as it is"


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_row_depends_on_no_other(dtype: torch.dtype) -> None:
    stack, spans = make_stack(dtype), make_spans([(2, 40), (1, 33)])
    x, condition = torch.randn(113, DIM, dtype=dtype), torch.randn(3, WIDTH, dtype=dtype)
    together = stack.run(x, spans, condition)
    for row, (rows, span) in enumerate(((slice(0, 40), 0), (slice(40, 80), 0), (slice(80, 113), 1))):
        alone = Span(slice(0, 1), slice(0, spans[span].length), 1, spans[span].length, spans[span].rope)
        assert torch.equal(stack.run(x[rows], [alone], condition[row : row + 1]), together[rows])


@torch.inference_mode()
def test_other_types_and_layouts_go_part_by_part() -> None:
    x, condition = torch.randn(20, DIM), torch.randn(1, WIDTH)
    packed, plain = make_stack(torch.float32), make_stack(torch.float32)
    native = packed.native()
    assert native is not None
    assert native.functions(x, condition) is not None
    assert native.functions(x.bfloat16(), None) is None
    assert native.functions(x, condition.bfloat16()) is None
    for layer in plain.modules():
        if isinstance(layer, Linear):
            layer.packing = None
    assert plain.native() is None


def test_whoever_differentiates_goes_part_by_part() -> None:
    condition = torch.randn(1, WIDTH)
    native = make_stack(torch.float32).native()
    assert native is not None
    assert native.functions(torch.randn(20, DIM, requires_grad=True), condition) is None
    assert native.functions(torch.randn(20, DIM), condition.requires_grad_()) is None
    assert native.functions(torch.randn(20, DIM), None) is not None
