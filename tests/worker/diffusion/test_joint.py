"""Packing of rows with two streams: nothing is lost, mixed up or seen by another row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_omni.layers.heads import HeadShape
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.worker.diffusion.joint import (
    Geometry,
    JointTokens,
    attended_streams,
    grouped,
    packing_order,
    spans_of,
)
from vllm_omni.worker.diffusion.packing import attended_rows
from vllm_omni.worker.diffusion.rope_tables import RopeTables, grid_positions

WIDTH, HEADS, SIZE = 64, 2, 32
SHAPE = HeadShape(HEADS, HEADS, SIZE, are_neighbours=True)
GRIDS = ((2, 3), (1, 4), (3, 2))
geometries = st.builds(Geometry, st.integers(0, 3), st.lists(st.sampled_from(GRIDS), min_size=1, max_size=3).map(tuple))


def positions(geometry: Geometry) -> Tensor:
    text = torch.zeros(geometry.num_text, 3, dtype=torch.long)
    text[:, 0] = torch.arange(geometry.num_text)
    image = torch.cat([grid_positions(*grid) for grid in geometry.grids])
    return torch.cat([text, torch.nn.functional.pad(image, (1, 0), value=7)])


ROPES = RopeTables(positions, (8, 12, 12), 2000.0)


def rope(geometry: Geometry) -> Tensor:
    return ROPES.of(geometry, torch.device("cpu"))


def packed(rows: list[Geometry], width: int = WIDTH) -> JointTokens:
    """Random tokens of rows, which are sorted."""
    order = packing_order(rows)
    chosen = [rows[row] for row in order]
    text = torch.randn(sum(row.num_text for row in chosen), width)
    image = torch.randn(sum(row.num_image for row in chosen), width)
    return JointTokens(text, image, torch.randn(len(rows), 5), grouped(chosen), tuple(order))


@settings(max_examples=60, deadline=None)
@given(st.lists(geometries, min_size=1, max_size=6), st.data())
def test_selected_rows_keep_their_tokens_conditions_and_callers(rows: list[Geometry], data: st.DataObject) -> None:
    tokens = packed(rows)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    part, before = tokens.select(chosen), tokens.per_row()
    assert [part.order[index] for index in range(len(chosen))] == [tokens.order[row] for row in chosen]
    assert [group.geometry for group in part.groups for _ in range(group.num_rows)] == [
        rows[tokens.order[row]] for row in chosen
    ]
    assert torch.equal(part.condition, tokens.condition[chosen])
    for got, row in zip(part.per_row(), chosen, strict=True):
        assert torch.equal(got, before[row])


@settings(max_examples=60, deadline=None)
@given(st.lists(geometries, min_size=1, max_size=6))
def test_both_streams_can_be_joined_row_by_row_and_parted_again(rows: list[Geometry]) -> None:
    tokens = packed(rows)
    assert torch.equal(tokens.both(), torch.cat(tokens.per_row()))
    for again in (tokens.with_both(tokens.both() + 1), tokens.with_rows([row + 1 for row in tokens.per_row()])):
        assert torch.equal(again.text, tokens.text + 1)
        assert torch.equal(again.image, tokens.image + 1)


def test_pictures_are_the_first_grids_of_their_rows() -> None:
    rows = [Geometry(2, ((2, 3), (1, 4))), Geometry(2, ((2, 3), (1, 4))), Geometry(1, ((3, 2),))]
    tokens = packed(rows)
    numbered = torch.arange(len(tokens.image))[:, None]
    assert [part.flatten().tolist() for part in tokens.pictures(numbered)] == [
        [*range(6)],
        [*range(6, 12), *range(16, 22)],
    ]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_attention_of_two_streams_is_that_of_each_joined_row_alone(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    rows = [
        Geometry(3, ((2, 3),)),
        Geometry(1, ((2, 3), (1, 4))),
        Geometry(3, ((2, 3),)),
        Geometry(0, ((3, 2),)),
    ]
    tokens = packed(rows, 3 * WIDTH)
    norms = (RMSNorm(SIZE, 1e-6).to(dtype), RMSNorm(SIZE, 1e-6).to(dtype))
    text, image = tokens.text.to(dtype), tokens.image.to(dtype)
    whole = tokens.with_both(tokens.both())
    attended = attended_streams(text.clone(), image.clone(), spans_of(tokens.groups, rope), SHAPE, (norms, norms))
    got = JointTokens(*attended, tokens.condition, tokens.groups, tokens.order).per_row()
    for index, row in enumerate(whole.per_row()):
        alone = grouped([rows[tokens.order[index]]])
        expected = attended_rows(row.to(dtype), spans_of(alone, rope).both, SHAPE, norms)
        assert (got[index] - expected).abs().max() <= tolerance
        assert expected.std() > 0.1


@torch.no_grad()
def test_what_is_seen_can_be_more_than_a_rows_own_tokens() -> None:
    torch.manual_seed(0)
    rows = [Geometry(1, ((2, 3),)), Geometry(2, ((2, 3),))]
    tokens = packed(rows, 3 * WIDTH)
    spans = spans_of(tokens.groups, rope)
    asked: list[int] = []

    def seen(index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(index)
        return torch.cat([key, torch.full_like(key, 50)[:, :, :1]], 2), torch.cat([value, value[:, :, :1] * 0 + 9], 2)

    own = attended_streams(tokens.text.clone(), tokens.image.clone(), spans, SHAPE, (None, None))
    more = attended_streams(tokens.text.clone(), tokens.image.clone(), spans, SHAPE, (None, None), seen)
    assert asked == [0, 1]
    assert not torch.allclose(own[0], more[0]) and not torch.allclose(own[1], more[1])
