"""Paged attention: every backend equals the definition and sees only the past; a row does not depend on its batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import HEAD_DIM, SIZE, Shape, Step, backends, find_backend

BACKENDS = backends()

shapes = st.lists(st.tuples(st.integers(0, 11), st.sampled_from([1, 1, 1, 2, 3, 7])), min_size=1, max_size=6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 2)]),
    seed=st.integers(0, 99),
    garbage=st.sampled_from([0.0, float("nan")]),
    window=st.none() | st.integers(1, 20),
)
def test_every_backend_equals_the_definition(
    backend: str, shapes: list[Shape], heads: tuple[int, int], seed: int, garbage: float, window: int | None
) -> None:
    step = Step(shapes, *heads, seed, garbage)
    torch.testing.assert_close(step.attend(backend, window), step.attend("reference", window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 50])
@pytest.mark.parametrize("past", [0, 6])
def test_a_window_is_the_token_itself_and_those_just_before_it(window: int, past: int) -> None:
    step = Step([(past, 5)], 2, 1, seed=3)
    slots = [step.tables[0][position // SIZE] * SIZE + position % SIZE for position in range(past)]
    key, value = (
        torch.cat([cache.flatten(0, 1)[slots], new])
        for cache, new in zip(step.cache, (step.key, step.value), strict=True)
    )
    expected = torch.zeros_like(step.query)
    for head in range(2):
        for row in range(5):
            seen = slice(max(0, past + row + 1 - window), past + row + 1)
            scores = key[seen, 0] @ step.query[row, head] / HEAD_DIM**0.5
            expected[row, head] = scores.softmax(0) @ value[seen, 0]
    torch.testing.assert_close(step.attend("reference", window), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 9])
def test_blocks_behind_the_window_are_never_read(backend: str, window: int) -> None:
    step = Step([(11, 1), (9, 1), (6, 3), (8, 4), (2, 1)], 4, 2, seed=6)
    expected = step.attend(backend, window)
    for table, (past, _) in zip(step.tables, step.shapes, strict=True):
        for index in range(max(0, past - window + 1) // SIZE):
            step.cache[:, table[index]] = float("nan")
            table[index] = 0  # any number may stand there by now
    torch.testing.assert_close(step.attend(backend, window), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_with_and_without_a_window_share_one_step(backend: str) -> None:
    step = Step([(11, 1), (6, 3), (2, 1)], 4, 2, seed=6)
    attention = find_backend(backend)(step.metadata)
    for window in (None, 3, 5, None, 3, 100):
        shared = attention(step.query, step.key, step.value, step.cache.clone(), window)
        torch.testing.assert_close(shared, step.attend(backend, window), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_behind_the_blocks_of_a_sequence_does_not_matter(backend: str) -> None:
    step = Step([(9, 1), (2, 1), (6, 3)], 4, 2, seed=4, garbage=float("nan"))
    expected = step.attend(backend)
    longest = max(map(len, step.tables))
    step.tables = [table + [step.tables[0][0]] * (longest + 2 - len(table)) for table in step.tables]
    torch.testing.assert_close(step.attend(backend), expected, rtol=0, atol=0)


def test_the_plain_backend_is_softmax_of_scaled_products_over_the_past() -> None:
    step = Step([(0, 5)], 2, 1, seed=3)
    expected = torch.zeros_like(step.query)
    for head in range(2):
        for row in range(5):
            scores = step.key[: row + 1, 0] @ step.query[row, head] / HEAD_DIM**0.5
            expected[row, head] = scores.softmax(0) @ step.value[: row + 1, 0]
    torch.testing.assert_close(step.attend("reference"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", [0, 6])
def test_a_token_sees_nothing_after_it(backend: str, past: int) -> None:
    step = Step([(past, 5), (3, 1)], 4, 2, seed=1)
    before = step.attend(backend)
    step.key[3:5] += 1.0
    step.value[3:5] -= 1.0
    after = step.attend(backend)
    torch.testing.assert_close(after[:3], before[:3], rtol=0, atol=0)
    assert not torch.allclose(after[3:5], before[3:5])
    torch.testing.assert_close(after[5:], before[5:], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_former_owner_left_in_the_pool_does_not_matter(backend: str) -> None:
    shapes = [(0, 3), (5, 1), (2, 1), (6, 3), (0, 1)]
    clean, dirty = Step(shapes, 4, 2, seed=5), Step(shapes, 4, 2, seed=5, garbage=float("nan"))
    torch.testing.assert_close(dirty.attend(backend), clean.attend(backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 3, 6])
def test_a_row_is_the_same_alone_and_in_a_crowd(backend: str, window: int | None) -> None:
    """To the last rounding: with several threads torch's kernel adds up a row in parts that depend on the batch."""
    step = Step([(9, 1), (10, 1), (2, 1), (0, 6), (5, 4), (11, 1), (8, 1)], 4, 2, seed=8)
    crowd = step.attend(backend, window)
    for index in range(len(step.shapes)):
        alone, rows = step.alone(index)
        torch.testing.assert_close(alone.attend(backend, window), crowd[rows], rtol=1e-6, atol=1e-6)


QUERY_ONLY = (0, 3, 4)
WITH_QUERY_ONLY = [(9, 4), (5, 1), (0, 6), (7, 1), (12, 7), (4, 2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_only_tokens_see_all_of_their_sequence_and_none_of_themselves(backend: str) -> None:
    step = Step(WITH_QUERY_ONLY, 4, 2, 7, float("nan"), query_only=QUERY_ONLY)
    attended = step.attend(backend)
    start = 0
    for index, (past, new) in enumerate(step.shapes):
        if index in step.query_only:
            table = step.tables[index]
            slots = [table[position // SIZE] * SIZE + position % SIZE for position in range(past)]
            keys, values = step.cache.flatten(1, 2)[:, slots].repeat_interleave(2, dim=2)
            scores = torch.einsum("qhd,lhd->hql", step.query[start : start + new], keys) / HEAD_DIM**0.5
            expected = torch.einsum("hql,lhd->qhd", scores.softmax(-1), values)
            torch.testing.assert_close(attended[start : start + new], expected, rtol=1e-5, atol=1e-5)
        start += new


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_only_tokens_change_nothing_for_others_and_do_not_depend_on_them(backend: str) -> None:
    step = Step(WITH_QUERY_ONLY, 4, 2, 7, query_only=QUERY_ONLY)
    crowd = step.attend(backend)
    for index in range(len(step.shapes)):
        alone, rows = step.alone(index)
        torch.testing.assert_close(alone.attend(backend), crowd[rows], rtol=1e-6, atol=1e-6)
