"""Drafts by n-grams: what stood behind the last tokens before, as far as drafts have been right."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.core.ar.prompt_lookup import PromptLookup
from vllm_omni.core.ar.sequence import Sequence


def make_sequence(tokens: list[int], number: int = 1) -> Sequence:
    return Sequence(number, f"r{number}", list(tokens), max_tokens=len(tokens) + 100)


def draft(tokens: list[int], most: int = 4, smallest: int = 2, largest: int = 3) -> list[int]:
    return PromptLookup(most, smallest, largest).draft(make_sequence(tokens), 64)


def test_what_followed_the_last_tokens_before_is_drafted() -> None:
    assert draft([1, 2, 3, 4, 5, 6, 9, 1, 2]) == [3, 4, 5, 6]
    assert draft([1, 2, 3, 9, 1, 2]) == [3, 9, 1, 2]
    assert draft([1, 2, 3, 9, 8, 2]) == [], "one token is fewer than the smallest n-gram"
    assert draft([1]) == draft([1, 2]) == []


def test_a_longer_match_counts_more_than_a_later_one_and_of_two_the_later() -> None:
    assert draft([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], most=1) == [3]
    assert draft([1, 2, 3, 8, 1, 2, 4, 9, 1, 2], most=1) == [4]


def test_a_text_that_goes_in_circles_is_drafted_as_going_on() -> None:
    assert draft([5, 5, 5], most=4) == [5, 5, 5, 5]
    assert draft([9, 1, 2, 1, 2], most=5) == [1, 2, 1, 2, 1]


@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    more=st.lists(st.integers(0, 2), max_size=8),
    smallest=st.integers(1, 2),
    most=st.integers(0, 6),
)
def test_drafts_are_those_of_a_search_through_all_tokens(
    tokens: list[int], more: list[int], smallest: int, most: int
) -> None:
    """Also of a sequence that has grown since it was read."""
    lookup, sequence = PromptLookup(64, smallest, 3), make_sequence(tokens)
    for token in (None, *more):
        if token is not None:
            sequence.append(token)
        expected: list[int] = []
        known = sequence.token_ids
        for size in range(3, smallest - 1, -1):
            places = [end for end in range(size, len(known)) if known[end - size : end] == known[-size:]]
            if places and not expected:
                whole = list(known)
                for offset in range(most):
                    whole.append(whole[places[-1] + offset])
                expected = whole[len(known) :]
                break
        assert lookup.draft(sequence, most) == expected


def test_wrong_drafts_become_short_and_right_ones_long_again_each_sequence_for_itself() -> None:
    lookup = PromptLookup(8, 1, 2)
    writer, other = make_sequence([1, 2] * 9, 1), make_sequence([3, 4] * 9, 2)
    sizes = []
    for num_accepted in (8, 3, 1, 0, 1, 2, 4, 8):
        size = len(lookup.draft(writer, 64))
        sizes.append(size)
        lookup.learn(writer, size, num_accepted)
    assert sizes == [8, 8, 4, 2, 1, 2, 4, 8]
    assert len(lookup.draft(other, 64)) == 8
    assert len(lookup.draft(other, 5)) == 5


def test_nothing_is_kept_of_a_sequence_that_has_ended() -> None:
    lookup = PromptLookup(8, 1, 2)
    for number in range(5):
        sequence = make_sequence([1, 2, 1], number)
        lookup.draft(sequence, 8)
        lookup.forget(sequence)
        lookup.forget(sequence)
    assert not lookup._memories
