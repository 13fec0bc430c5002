"""Text in pieces, cut into sentences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.entrypoints.server.speaking.sentences import Granularity, Sentences

PIECES = st.lists(st.text(alphabet="ab1 .,!?;\n。，'\")", max_size=8), max_size=12)


def cut(granularity: Granularity, *pieces: str) -> list[str]:
    sentences = Sentences(granularity)
    return [*(found for piece in pieces for found in sentences.add(piece)), *sentences.flush()]


@pytest.mark.parametrize(
    ("granularity", "text", "expected"),
    [
        ("none", "One. Two!\nThree?", ["One. Two!\nThree?"]),
        ("sentence", "One. Two!\nThree?", ["One.", "Two!", "Three?"]),
        ("sentence", "Pi is 3.14, roughly. Yes", ["Pi is 3.14, roughly.", "Yes"]),
        ("sentence", 'He said "no." Then left.', ['He said "no."', "Then left."]),
        ("sentence", "你好。再见！", ["你好。", "再见！"]),
        ("sentence", "... \n\n !", []),
        ("clause", "First, second; third: 1,000 at 10:30.", ["First,", "second;", "third:", "1,000 at 10:30."]),
    ],
)
def test_cuts_are_where_a_reader_pauses(granularity: Granularity, text: str, expected: list[str]) -> None:
    assert cut(granularity, text) == expected


@given(PIECES, st.sampled_from(["none", "sentence", "clause"]))
def test_nothing_is_lost_but_white_space_and_lone_marks(pieces: list[str], granularity: Granularity) -> None:
    said = "".join(cut(granularity, *pieces))
    assert [char for char in said if char.isalnum()] == [char for char in "".join(pieces) if char.isalnum()]


@given(PIECES, st.sampled_from(["none", "sentence"]))
def test_words_do_not_depend_on_the_pieces(pieces: list[str], granularity: Granularity) -> None:
    """A mark at the end of a piece waits for what follows it: the cut is the same as in one piece."""
    assert cut(granularity, *pieces) == cut(granularity, "".join(pieces))
