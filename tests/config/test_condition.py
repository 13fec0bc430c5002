"""Conditions mean what Python means by them, over a meta whose missing keys are None, and nothing else is let in."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.config.condition import MAX_CHARS, MAX_DEPTH, Condition
from vllm_omni.errors import ConfigError, StageError

META = {"sound": "C4 on a string", "n": 3, "x": 0.5, "done": True, "empty": "", "reason": "stop", "notes": ["C4", "E4"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sound", True),
        ("empty", False),
        ("missing", False),
        ("missing == None", True),
        ("empty != None", True),
        ("not missing and done", True),
        ("n == 3 and x < 1", True),
        ("1 < n <= 3", True),
        ("1 < n < 3", False),
        ("n > -1", True),
        ("reason in ['stop', 'length']", True),
        ("reason not in ('stop', 'length')", False),
        ("'string' in sound", True),
        ("'E4' in notes", True),
        ("(missing or reason) == 'stop'", True),
        ("missing and missing > 3", False),
        ("not (missing or n != 3)", True),
        ("done == True", True),
        ("n in [x, n]", True),
        ("  sound\n", True),
        ('reason == "stop"', True),
    ],
)
def test_a_condition_holds_as_in_python(text: str, expected: bool) -> None:
    assert Condition.parse(text).holds(META) is expected


constants = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([0.5, -1.5]), st.text(alphabet="ab'\"\\", max_size=3)
)
names = st.sampled_from(["n", "x", "sound", "empty", "missing", "notes"])
choices = st.lists(constants.map(repr), max_size=3).map(lambda items: f"[{', '.join(items)}]")


def compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    comparisons = st.tuples(inner, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), inner).map(" ".join)
    members = st.tuples(inner, st.sampled_from(["in", "not in"]), choices | inner).map(" ".join)
    joined = st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join)
    return st.one_of(comparisons, members, joined, inner.map("not {}".format)).map("({})".format)


expressions = st.recursive(names | constants.map(repr), compound, max_leaves=8)


@given(expressions, names)
def test_any_expression_gives_what_python_gives_or_fails_where_python_does(text: str, name: str) -> None:
    text = f"{text} or {name}"
    condition = Condition.parse(text)
    assert Condition.parse(str(condition)) == condition
    try:
        expected = bool(eval(text, {"__builtins__": {}}, defaultdict(lambda: None, META)))
    except TypeError:
        with pytest.raises(StageError, match="cannot be decided"):
            condition.holds(META)
    else:
        assert condition.holds(META) is expected


@pytest.mark.parametrize("text", ["n > 3", "'x' in n", "1 in sound", "n < 3 < sound"])
def test_what_cannot_be_compared_is_said_with_the_condition_and_a_fix(text: str) -> None:
    with pytest.raises(StageError) as caught:
        Condition.parse(text).holds({"sound": "C4", "n": None} if text != "n < 3 < sound" else {"n": 1, "sound": "C4"})
    assert f"when '{text}' cannot be decided" in str(caught.value) and "test for it first" in str(caught.value)


def test_a_value_of_any_type_cannot_break_more_than_its_condition() -> None:
    class Odd:
        def __bool__(self) -> bool:
            raise RuntimeError("ambiguous")

    with pytest.raises(StageError, match="ambiguous"):
        Condition.parse("odd").holds({"odd": Odd()})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("sound ==", "cannot be read"),
        ("sound = 3", "cannot be read"),
        ("a\x00b", "cannot be read"),
        ("((((a))", "cannot be read"),
        ("len(sound)", "got 'len(sound)', expected names, constants, comparisons"),
        ("n > 3 and sound.strip()", "got 'sound.strip()'"),
        ("sound[0] == 'C'", "got 'sound[0]'"),
        ("n + 1 > 3", "got 'n + 1'"),
        ("-n > 3", "got '-n'"),
        ("sound is None", "got 'sound is None'"),
        ("lambda: n", "got 'lambda: n'"),
        ("[n for n in notes]", "got '[n for n in notes]'"),
        ("n if n else x", "got 'n if n else x'"),
        ("f'{n}'", "expected names"),
        ("n == b'x'", "expected names"),
        ("n == ...", "expected names"),
        ("n < 1e999", "expected names"),
        ("n < 2j", "expected names"),
        ("(n := 3)", "expected names"),
        ("n in [*notes]", "expected names"),
        ("sound, n", "got 'sound, n'"),
        ("[sound]", "got '[sound]'"),
        ("'sound'", "reads no key of the meta"),
        ("True", "reads no key of the meta"),
        ("done == true", "got 'true', a name that no meta has; write True"),
        ("sound != null", "write None"),
        ("n == '" + "a" * MAX_CHARS + "'", f"expected at most {MAX_CHARS}"),
        ("not " * MAX_DEPTH + "n", f"expected at most {MAX_DEPTH} levels"),
        ("not " * 120 + "n", f"expected at most {MAX_DEPTH} levels"),
        ("(" * 240 + "n" + ")" * 240, "cannot be read"),
    ],
)
def test_anything_else_is_a_config_error_that_says_what_was_expected(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Condition.parse(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_depth_and_length_up_to_the_limits_are_taken() -> None:
    assert Condition.parse("not " * (MAX_DEPTH - 1) + "n").holds({}) is True
    assert Condition.parse("n" + " " * (MAX_CHARS - 1)).holds({"n": 1})


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_and_never_more(text: str) -> None:
    try:
        condition: Any = Condition.parse(text)
    except ConfigError:
        return
    assert condition.names and Condition.parse(str(condition)) == condition


def test_one_condition_in_two_spellings_is_one_condition() -> None:
    spelt = [Condition.parse(text) for text in ("reason=='stop' and n", '( reason == "stop" )  and n')]
    assert spelt[0] == spelt[1] and hash(spelt[0]) == hash(spelt[1]) and str(spelt[0]) == "reason == 'stop' and n"
    assert spelt[0].names == {"reason", "n"}
