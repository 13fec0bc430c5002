"""Products of low rank beside a layer's own: every row gets its request's, or it is said that nobody knows which."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_omni.layers.linear import Linear, pack_linears, quantize_linears
from vllm_omni.layers.lora import Adapter, AdapterMix, LowRank, UnplacedRowsError, Up, acting, adapted, packed

WIDTH, RANK = 64, 3


def layer(seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    return Linear(WIDTH, WIDTH, can_quantize=True).requires_grad_(False)


def mix(on: Linear, seed: int, scale: float = 1.0) -> AdapterMix:
    """Of the first half of the outputs, and of the second with a rank of its own."""
    draw = torch.Generator().manual_seed(seed)
    half = WIDTH // 2
    ups = tuple(
        Up(slice(start, start + half), ranks, torch.randn(half, ranks.stop - ranks.start, generator=draw))
        for start, ranks in ((0, slice(0, RANK)), (half, slice(RANK, RANK + 2)))
    )
    low = LowRank(torch.randn(RANK + 2, WIDTH, generator=draw), ups)
    return AdapterMix(f"{seed}*{scale}", ((Adapter({on: low}, 0), scale),))


def expected(on: Linear, x: Tensor, mixes: list[AdapterMix | None]) -> Tensor:
    """Row by row."""
    out = on(x)
    for row, each in enumerate(mixes):
        for adapter, scale in () if each is None else each.parts:
            low = adapter.layers[on]
            for up in low.ups:
                out[row, up.columns] += scale * (x[row] @ low.down[up.ranks].T @ up.matrix.T)
    return out


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6), st.randoms())
@settings(max_examples=60, deadline=None)
def test_rows_of_any_packing_get_their_own(rows: list[tuple[int, int]], random: object) -> None:
    """rows: (which adapters, how many tokens) of each."""
    on = layer()
    choices = [None, mix(on, 1), mix(on, 2, 0.5), AdapterMix("both", mix(on, 1).parts + mix(on, 3, -1.0).parts)]
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    tokens = [choices[rows[row][0]] for row in order for _ in range(rows[row][1])]
    x = torch.randn(len(tokens), WIDTH)
    lengths = [rows[row][1] for row in order]
    with adapted([choices[which] for which, _ in rows]), packed(order, lengths, [1] * len(rows)):
        found = on(x)
        per_row = on(x[: len(rows)])
    torch.testing.assert_close(found, expected(on, x, tokens), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        per_row, expected(on, x[: len(rows)], [choices[rows[row][0]] for row in order]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("is_int8", [False, True])
def test_the_weight_stays_as_it_is_packed_or_in_int8(is_int8: bool) -> None:
    on = layer()
    if is_int8:
        published = on.weight.detach().clone()
        quantize_linears(on)
        on.fill(slice(None), published, None)
    pack_linears(on)
    x, each = torch.randn(5, WIDTH), mix(on, 1)
    before, weight = on(x).clone(), on.weight.to_dense().clone()  # oneDNN keeps its layout to itself
    with adapted([each]):
        found = on(x)
    torch.testing.assert_close(found, expected(on, x, [each] * 5), atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 1
    assert torch.equal(on(x), before) and torch.equal(on.weight.to_dense(), weight)


def test_equal_adapters_of_all_rows_need_no_packing() -> None:
    on = layer()
    x, each = torch.randn(2, 7, WIDTH), mix(on, 1)
    with adapted([each, each]):
        found = on(x)
    torch.testing.assert_close(found.flatten(0, 1), expected(on, x.flatten(0, 1), [each] * 14), atol=1e-4, rtol=1e-4)


def test_rows_that_nobody_told_of_are_refused_not_guessed() -> None:
    on = layer()
    with adapted([mix(on, 1), None]), packed([0, 1], [3, 5]), pytest.raises(UnplacedRowsError):
        on(torch.randn(7, WIDTH))


def test_two_packings_with_as_many_rows_are_refused_not_guessed() -> None:
    on = layer()
    with adapted([mix(on, 1), None]), packed([0, 1], [3, 5], [4, 4]), pytest.raises(UnplacedRowsError):
        on(torch.randn(8, WIDTH))


def test_layers_that_no_adapter_touches_take_any_rows() -> None:
    on, other = layer(), layer(1)
    with adapted([mix(on, 1), None]):
        assert other(torch.randn(7, WIDTH)).shape == (7, WIDTH)


def test_nothing_acts_outside_of_a_pass_and_after_a_failed_one() -> None:
    on = layer()
    with pytest.raises(ZeroDivisionError), adapted([mix(on, 1)]):
        assert acting() is not None
        raise ZeroDivisionError
    assert acting() is None
    with adapted([None, None]):
        assert acting() is None
