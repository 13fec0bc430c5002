"""Thinker and talker against transformers' generate, word by word and code by code: alone, in a crowd, in chunks, from
the prefix cache, and when the KV pool is too small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from speech_engines import Case, Speech, make_case, make_engine, reference
from speech_helpers import save_tiny_omni, tiny_reference

from vllm_omni.models.pool import ModelPool

CASES = {
    "text": make_case(""),
    "image": make_case("i", seed=1),
    "audio": make_case("a", seed=2),
    "video": make_case("v", seed=3),
    "all": make_case("aivi", seed=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_omni(tmp_path_factory.mktemp("speech") / "model")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_reference()


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


@pytest.fixture(scope="module")
def expected(model: Any) -> dict[str, tuple[list[int], list[int]]]:
    return {name: reference(model, case) for name, case in CASES.items()}


def ours(case: Case, model: Any) -> Any:
    return case.prompt(model) if case.items else case.token_ids


@pytest.mark.parametrize("name", CASES)
def test_words_and_codes_equal_the_reference(
    name: str, folder: Path, model: Any, pool: ModelPool, expected: Any
) -> None:
    speech = Speech(make_engine(folder, "thinker", pool), make_engine(folder, "talker", pool))
    speech.submit(name, ours(CASES[name], model))
    speech.run()
    assert not speech.failed
    assert (speech.words[name], speech.codes[name]) == expected[name]
