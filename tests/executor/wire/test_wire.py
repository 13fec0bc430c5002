"""Messages survive being written and read; nothing else is read, and none of it costs more memory than its length."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.toy_engine import PictureParams, register_toys, toy_config
from torch import Tensor

from vllm_omni import errors, messages
from vllm_omni.engine.boundary import describe
from vllm_omni.executor.orders import Ask, Refuse, Report, StageOrder, Submit
from vllm_omni.executor.wire.base import MAX_FRAME_BYTES, MAX_ITEMS, Tag, WireError
from vllm_omni.executor.wire.codec import decode, encode
from vllm_omni.executor.wire.table import SHARED, WireTypes
from vllm_omni.lora import LoRA
from vllm_omni.media.audio import Audio
from vllm_omni.params import DiffusionParams, SamplingParams
from vllm_omni.payload import RowRange, SavedStage, StagePayload, StreamChunk
from vllm_omni.request import OmniRequest

TYPES = WireTypes()


def crossed(message: Any, types: WireTypes = TYPES) -> Any:
    tensors: list[Tensor] = []

    def put(tensor: Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    return decode(encode(message, put, types), tensors.__getitem__, types)


def same(one: Any, other: Any) -> bool:
    """Equal in type and content, of tensors, arrays and pictures too."""
    if type(one) is not type(other):
        return isinstance(one, Mapping) and isinstance(other, Mapping) and same(dict(one), dict(other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, Image.Image):
        return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
    if isinstance(one, BaseException):
        return str(one) == str(other)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers() | st.tuples(st.text()), inner)
        | st.frozensets(st.text())
        | st.sets(st.integers())
    ),
    max_leaves=20,
)
REQUESTS = st.builds(
    OmniRequest,
    prompt=st.text(min_size=1) | st.lists(st.integers(0, 2**40), min_size=1, max_size=40),
    negative_prompt=st.none() | st.text(),
    params=st.none() | st.just({"a": SamplingParams(seed=2**63 - 1, stop=("x",), logit_bias={3: -1.0})}),
    timeout_s=st.none() | st.floats(0.1, 9),
    fields=st.dictionaries(st.sampled_from(["lyrics", "audio", "image"]), PLAIN),
)


@given(PLAIN)
def test_plain_values_survive(value: Any) -> None:
    assert same(crossed(value), value)


@settings(max_examples=40)
@given(REQUESTS, PLAIN, st.integers(0, 3))
def test_tasks_and_events_survive(request: OmniRequest, value: Any, size: int) -> None:
    rows = torch.arange(size * 2.0).reshape(size, 2)
    task = messages.StageTask(
        request, "a", DiffusionParams(sigmas=(1.0, 0.5), lora=(LoRA("x"),)), {"in": StreamChunk(rows, 3)}, None, None
    )
    payload = StagePayload(request.request_id, "a", {"image": rows}, {"more": value})
    saved = SavedStage({"kind": "dit"}, {"latents": rows.bfloat16(), "step": 3})
    events = [
        messages.StageProgress(request.request_id, 1, 2, "x", rows, (1, 2), ({5: -0.5},), "stop"),
        messages.StageRows(request.request_id, "codes", rows, True, {"rate": 1}),
        messages.StageWorked(request.request_id),
        messages.ChunkConsumed(request.request_id, "codes"),
        messages.StageDone(payload, {"steps": 2}),
        messages.StageFailed(request.request_id, errors.StageError("no"), payload),
    ]
    report = Report(7, "busy", events)
    for each in (Submit(task), report, saved, RowRange(0, 3), Ask(1, "save_state", "r")):
        assert same(crossed(each), each)


def test_media_survive_with_what_changes_how_they_are_read() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (300, 200, 3), dtype=np.uint8))
    turned = picture.copy()
    turned.getexif()[0x0112] = 6
    palette = picture.quantize(16)
    palette.info["transparency"] = 3
    sound = Audio(rng.standard_normal((2, 9000), dtype=np.float32), 24000)
    fields = {
        "image": [
            picture,
            turned,
            palette,
            picture.convert("LA"),
            Image.new("1", (9, 3), 1),
            Image.new("I;16", (2, 2)),
        ],
        "audio": [sound, (np.arange(5, dtype=">i2"), 16000), np.float32(0.1), np.array(["a", "bc"])],
        "path": Path("/tmp/x y"),
        "bytes": [bytearray(b"x" * 100_000), memoryview(b"yy")],
        "odd": [torch.float16, torch.device("cpu"), range(3), 1 << 200, "\ud800", math.inf],
    }
    found = crossed(OmniRequest(prompt="x", fields=fields)).fields
    assert found["image"][1].getexif()[0x0112] == 6 and found["image"][2].info["transparency"] == 3
    assert all(map(same, found["image"], fields["image"])) and same(found["audio"], fields["audio"])
    assert found["path"] == fields["path"] and found["bytes"] == [b"x" * 100_000, b"yy"]
    assert found["odd"] == [*fields["odd"][:2], [0, 1, 2], *fields["odd"][3:]]


def test_lists_of_any_length_survive() -> None:
    for value in ([*range(100_000)], ["x"] * 20_000, tuple([1.5] * 9_000), {n: str(n) for n in range(9_001)}):
        assert same(crossed(value), value)


def test_a_config_survives_and_types_of_its_stage_kinds_alone_are_known() -> None:
    config = toy_config()
    types = WireTypes(stage.kind for stage in config.stages.values())
    assert same(crossed(config, types), config)
    register_toys()
    asked = OmniRequest(prompt="x", params=PictureParams(seed=3))
    assert crossed(asked, types) == asked
    with pytest.raises(WireError, match=r"params: got a support.toy_engine.PictureParams, which cannot be sent"):
        crossed(asked)


@pytest.mark.parametrize(
    "error",
    [
        errors.StageUnavailableError("wait", 2.5),
        errors.InvalidRequestError("seed: got -1"),
        ValueError("x"),
        KeyError("oops"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        OSError(2, "No such file"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
        type("SafetensorError", (Exception,), {})("header"),
    ],
    ids=repr,
)
def test_errors_keep_name_words_attributes_cause_and_lines(error: Exception) -> None:
    try:
        try:
            raise LookupError("deep")
        except LookupError as cause:
            raise error from cause
    except Exception as caught:
        found = crossed(caught)
    assert isinstance(found, Exception) and type(found).__name__ == type(error).__name__
    assert isinstance(error, UnicodeDecodeError) or describe(found) == describe(error)
    known = type(error).__name__ != "SafetensorError"
    assert not known or type(found) is type(error)
    assert isinstance(found.__cause__, LookupError) and "test_wire.py" in str(found.__cause__.__cause__)
    if isinstance(error, errors.StageUnavailableError):
        assert found.retry_after_s == 2.5  # type: ignore[attr-defined]
    assert describe(crossed(found)) == describe(found)


UNSENDABLE = {
    "object": object(),
    "function": lambda: 0,
    "iterator": iter([]),
    "array of objects": np.array([object()]),
    "built-in": open,
    "class": WireTypes,
}


@pytest.mark.parametrize("value", UNSENDABLE.values(), ids=UNSENDABLE.keys())
def test_what_cannot_be_sent_is_refused(value: Any) -> None:
    with pytest.raises(WireError, match=r"cannot be sent|expected numbers or texts"):
        crossed({"deep": [value]})


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(WireError, match="levels"):
        crossed(loop)


def nested(depth: int) -> bytes:
    return b"\xdd\x00\x00\x10\x00" * depth


LIES = {
    "empty": b"",
    "truncated": msgpack.packb([0, 1, 2])[:-1],
    "left over": msgpack.packb(1) + b"\x00",
    "an array without a tag": msgpack.packb([]),
    "an unknown tag": msgpack.packb([99]),
    "a tag that is a word": msgpack.packb(["LIST"]),
    "a huge array": b"\xdd\xff\xff\xff\xff",
    "a huge map": b"\xdf\xff\xff\xff\xff",
    "a huge string": b"\xdb\xff\xff\xff\xff",
    "huge bytes": b"\xc6\xff\xff\xff\xff",
    "arrays in arrays": nested(1000),
    "arrays in arrays, each long": nested(200_000),
    "deep": b"\x92\x00" * 500 + b"\xc0",
    "an extension": msgpack.packb(msgpack.ExtType(5, b"")),
    "a time": msgpack.packb(msgpack.Timestamp(1)),
    "an unknown class": msgpack.packb([Tag.RECORD, "os:system", {"command": "x"}]),
    "a module's own class": msgpack.packb([Tag.RECORD, "vllm_omni.messages:StageTask", {}]),
    "a record without fields": msgpack.packb([Tag.RECORD, "StageTask", {}]),
    "a record of a list": msgpack.packb([Tag.RECORD, "RowRange", [0, 1]]),
    "a choice that is none": msgpack.packb([Tag.CHOICE, "SchedulerType", "random"]),
    "an array of objects": msgpack.packb([Tag.ARRAY, "|O", [0, 1], b"12345678"]),
    "a large array": msgpack.packb([Tag.ARRAY, "<f8", [0, 2**40], b"12345678"]),
    "a negative array": msgpack.packb([Tag.ARRAY, "<f8", [0, -1, -1], b"12345678"]),
    "a dtype of fields": msgpack.packb([Tag.ARRAY, "i4,(9)i4", [0], b"12345678"]),
    "a large picture": msgpack.packb([Tag.PICTURE, "RGB", 60_000, 60_000, b"xyz", None, {}]),
    "a small picture": msgpack.packb([Tag.PICTURE, "RGB", 2, 2, b"xyz", None, {}]),
    "a tensor that is not there": msgpack.packb([Tag.TENSOR, 3]),
    "bytes that are not there": msgpack.packb([Tag.INTEGERS, 0, [Tag.BYTES, "x"]]),
    "integers cut in two": msgpack.packb([Tag.INTEGERS, 0, b"123"]),
    "integers as a record": msgpack.packb([Tag.INTEGERS, Tag.RECORD, b"12345678"]),
    "digits of a huge number": msgpack.packb([Tag.BIG_INTEGER, "f" * 5000]),
    "a dtype that is a function": msgpack.packb([Tag.DTYPE, "load"]),
    "an error that is a module": msgpack.packb([Tag.ERROR, [0, "os.system", "x", {}, None], ""]),
    "an error without words": msgpack.packb([Tag.ERROR, None, ""]),
    "a list as the key of a set": msgpack.packb([Tag.SET, [Tag.LIST]]),
    "a dict of a half pair": msgpack.packb([Tag.DICT, 1]),
}


@pytest.mark.parametrize("body", LIES.values(), ids=LIES.keys())
def test_lies_are_refused(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="got"):
            decode(body, [].__getitem__, TYPES)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_a_message_that_is_too_long_is_neither_written_nor_read() -> None:
    with pytest.raises(WireError, match="expected at most"):
        encode("x" * (MAX_FRAME_BYTES + 1), lambda tensor: 0, TYPES)
    with pytest.raises(WireError, match="expected at most"):
        decode(memoryview(bytearray(MAX_FRAME_BYTES + 1)), [].__getitem__, TYPES)


@given(st.binary(max_size=200))
def test_garbage_is_a_plain_value_or_refused(body: bytes) -> None:
    try:
        found = decode(body, [].__getitem__, TYPES)
    except WireError:
        return
    assert same(crossed(found), found)


@settings(max_examples=200)
@given(st.data())
def test_a_message_with_bytes_changed_is_a_message_or_refused(data: st.DataObject) -> None:
    task = messages.StageTask(
        OmniRequest(prompt=[1, 2, 3] * 20, fields={"image": Image.new("P", (4, 4)), "x": {1, 2}}), "a", SamplingParams()
    )
    body = bytearray(
        encode(Report(3, "idle", [messages.StageFailed("r", errors.CacheError("x"))], [], None), int, TYPES)
    )
    body = bytearray(encode(Submit(task), int, TYPES)) if data.draw(st.booleans()) else body
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        decode(bytes(body), [].__getitem__, TYPES)


def test_the_table_names_each_type_once_and_every_order_and_event() -> None:
    assert {*get_args(messages.StageEvent), *get_args(StageOrder)} - {Refuse} <= set(SHARED), "no refusal is sent"
    assert len({kind.__name__ for kind in SHARED}) == len(SHARED)
    assert MAX_ITEMS % 2 == 0, "pairs stay together"
