"""A few seconds of every fuzzer; `make fuzz` goes on for longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from fuzz.__main__ import FUZZERS
from fuzz.mutation import mutate, mutate_bytes, mutate_text
from fuzz.tally import Tally, time_limit

from vllm_omni.errors import InvalidRequestError

SECONDS = 3.0


@pytest.fixture(scope="module")
def cases() -> Iterator[dict[str, Any]]:
    made = {name: build() for name, build in FUZZERS.items()}
    yield made
    for case in made.values():
        case.close()


@pytest.mark.parametrize("name", FUZZERS)
def test_odd_input_ends_in_an_answer_or_in_words(name: str, cases: dict[str, Any]) -> None:
    tally = Tally(name, seed=1).run(cases[name], seconds=SECONDS, most=400)
    assert tally.num_inputs > 5 and not tally.faults, tally.report()


@pytest.mark.parametrize(
    ("case", "word"),
    [
        (lambda random: "fine", "fine"),
        (lambda random: _raise(InvalidRequestError("x")), "refused: InvalidRequestError"),
        (lambda random: _raise(TypeError("x")), "crash"),
        (lambda random: _raise(RecursionError("x")), "crash"),
    ],
)
def test_a_tally_tells_refusals_from_faults(case: Callable[[Random], str], word: str) -> None:
    tally = Tally("x", 1).run(case, seconds=5, most=1)
    assert dict(tally.outcomes) == {word: 1} and bool(tally.faults) is (word == "crash")


def test_a_hang_is_found() -> None:
    def hang(random: Random) -> str:
        while True:
            pass

    tally = Tally("x", 1, limit_s=0.05).run(hang, seconds=5, most=1)
    assert dict(tally.outcomes) == {"hang": 1} and "1 hangs" in tally.report() and "--first 0" in tally.report()
    with time_limit(1.0):
        pass


def test_the_same_number_gives_the_same_input() -> None:
    tree, text = {"a": [1, 2, {"b": "c"}], "d": None}, "a: 1\nb: [2]\n"
    for index in range(50):
        first, second = (
            (repr(mutate(tree, random)), mutate_text(text, random), mutate_bytes(text.encode(), random))
            for random in (Random(f"1 {index}"), Random(f"1 {index}"))
        )
        assert first == second
    assert tree == {"a": [1, 2, {"b": "c"}], "d": None}


def _raise(error: Exception) -> str:
    raise error
