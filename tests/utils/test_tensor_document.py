"""Documents with tensors: what is written is read, and nothing else is believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.tensor_document import DTYPES, read_document, write_document

KIND = "test.document"
tensors = st.builds(
    lambda dtype, shape: torch.ones(shape, dtype=dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
)
plain = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e300, 1e300) | st.text(max_size=5)
names = st.text(max_size=5).filter(lambda name: name != "$tensor")
documents = st.dictionaries(
    names,
    st.recursive(plain | tensors, lambda of: st.lists(of, max_size=3) | st.dictionaries(names, of, max_size=3)),
    max_size=4,
)
once = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) and type(left) is type(right)


@once
@given(document=documents)
def test_what_is_written_is_read(tmp_path: Path, document: dict[str, Any]) -> None:
    write_document(tmp_path / "x.safetensors", KIND, document)
    assert same(read_document(tmp_path / "x.safetensors", KIND), document)


GOOD = {"name": "état", "list": [1, {"x": torch.arange(6).reshape(2, 3)}], "y": torch.rand(4), "no": None}


@once
@given(data=st.data())
def test_a_damaged_file_is_a_document_or_refused_in_words(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    write_document(path, KIND, GOOD)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 8)))
        content[start:stop] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    try:
        read_document(path, KIND)
    except InvalidRequestError as error:
        assert str(path) in str(error)


def written(path: Path, text: str, named: dict[str, Tensor] | None = None) -> Path:
    path.write_bytes(save(named or {"": torch.zeros(0)}, {KIND: text}))
    return path


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "got a JSON list"),
        ("{", "cannot be read"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": 1' + "0" * 400 + "}", "an integer of 401 digits"),
        ('{"a": 1e999}', "a"),
        (f'{{"a": {DEEP}}}', "cannot be read|too much"),
        ('{"a": {"$tensor": "gone"}}', "the tensor 'gone', which is not there"),
        ('{"a": {"$tensor": 7}}', "the tensor 7"),
        ('{"a": {"$tensor": "x"}, "b": {"$tensor": "x"}}', "b: got the tensor 'x', which is not there for it"),
        ('{"a": 1}', "the tensor 'x', which nothing refers to"),
    ],
)
def test_what_a_stranger_may_write_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        read_document(written(tmp_path / "x.safetensors", text, {"x": torch.ones(2)}), KIND)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([float("inf")], dtype=torch.bfloat16), "not finite"),
        (torch.ones(2, dtype=torch.int16), "got torch.int16, expected one of"),
    ],
)
def test_numbers_that_nobody_computes_with_are_refused(tmp_path: Path, tensor: Tensor, words: str) -> None:
    path = written(tmp_path / "x.safetensors", json.dumps({"a": {"$tensor": "x"}}), {"x": tensor})
    with pytest.raises(InvalidRequestError, match=words):
        read_document(path, KIND)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", struct.pack("<Q", 2**60) + b"{}", save({"x": torch.ones(1)}, {"format": "pt"})]
)
def test_files_of_something_else_are_refused_in_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=f"{path}.*expected {KIND}"):
        read_document(path, KIND)


def test_what_is_no_file_is_refused_in_words(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone", "\0", "x" * 5000, "/dev/zero"):
        with pytest.raises(InvalidRequestError):
            read_document(path, KIND)


@pytest.mark.parametrize("value", [{1: 2}, {"$tensor": "x"}, float("nan"), object(), b"bytes"])
def test_what_no_document_holds_is_refused_when_it_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"which test\.document cannot hold"):
        write_document(tmp_path / "x.safetensors", KIND, {"a": [value]})
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_document(path, KIND, {"a": 1})
    with pytest.raises(InvalidRequestError):
        write_document(path, KIND, {"a": object()})
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        write_document(path / "below" / "x.safetensors", KIND, {"a": 1})
    assert read_document(path, KIND) == {"a": 1}
