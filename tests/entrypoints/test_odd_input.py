"""Values that no caller should send: each refuses its own request with words, and nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.odd_values import ODD, Endless, NoRepr, Raising
from support.toy_engine import TextParams, text_config

from vllm_omni import AsyncOmni, DiffusionParams, Omni, OmniRequest, RequestStatus, SamplingParams
from vllm_omni.errors import MAX_MESSAGE, InvalidRequestError, OmniError, StageError

NUMBERS = ("temperature", "top_p", "top_k", "max_tokens", "seed", "n", "logprobs")
TRIED = [
    *[(lambda value, name=name: SamplingParams(**{name: value}), name) for name in NUMBERS],
    *[(lambda value, name=name: DiffusionParams(**{name: value}), name) for name in ("height", "seed", "duration_s")],
    (lambda value: SamplingParams(ignore_eos=NoRepr() if value is True else value), "ignore_eos"),
    (lambda value: OmniRequest(prompt="x", timeout_s=value), "timeout_s"),
    (lambda value: OmniRequest(prompt="", is_open=NoRepr() if value is True else value), "is_open"),
]


@pytest.mark.parametrize(("make", "name"), TRIED, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_an_odd_value_is_refused_by_the_name_of_its_field(make: Callable[[Any], Any], name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name}: got ") as caught:
        make(value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [v for v in ODD if not isinstance(v, str)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "name", ["stop", "stop_token_ids", "logit_bias", "sigmas", "extra", "output_type", "fields", "params"]
)
def test_odd_collections_are_refused_or_read_within_bounds(name: str, value: Any) -> None:
    kinds: dict[str, Any] = {"sigmas": DiffusionParams, "extra": DiffusionParams, "output_type": DiffusionParams}
    if name in ("fields", "params"):
        kinds[name] = lambda **given: OmniRequest(prompt="x", **given)
    try:
        kinds.get(name, SamplingParams)(**{name: value})
    except InvalidRequestError as error:
        assert str(error).startswith(name) and len(str(error)) < 300
    else:
        is_empty = isinstance(value, (dict, list)) and not value
        assert is_empty or (name == "stop" and list(value) in (["a"], ["x"])), "this should have been refused"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", np.int64(3), 3),
        ("seed", torch.tensor(3), 3),
        ("seed", np.array(3), 3),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", torch.tensor(0.5), 0.5),
        ("stop_token_ids", range(3), (0, 1, 2)),
        ("stop_token_ids", np.arange(3), (0, 1, 2)),
        ("stop_token_ids", torch.arange(3), (0, 1, 2)),
        ("stop", ("a", "b"), ("a", "b")),
        ("logit_bias", {np.int64(1): np.float32(2)}, {1: 2.0}),
    ],
)
def test_sensible_values_are_taken_as_plain_ones(name: str, value: Any, expected: Any) -> None:
    found = getattr(SamplingParams(**{name: value}), name)
    assert found == expected and type(found) is type(expected)
    parts = found if isinstance(found, tuple) else found.items() if isinstance(found, dict) else [found]
    assert all(type(part).__module__ == "builtins" for part in parts)


@pytest.mark.parametrize("prompt", [range(1, 4), (1, 2, 3), np.array([1, 2, 3]), torch.tensor([1, 2, 3])])
def test_token_ids_may_come_in_any_sequence(prompt: Any) -> None:
    assert OmniRequest(prompt=prompt).prompt == [1, 2, 3]


@pytest.mark.parametrize(
    "prompt", [Endless(), range(10**9), np.zeros((2, 2)), [NoRepr()], [Raising()], Raising(), NoRepr()]
)
def test_odd_prompts_are_refused(prompt: Any) -> None:
    with Omni(text_config()) as omni:
        odd, good = omni.generate([{"prompt": prompt}, "a"])
    assert odd.status is RequestStatus.REJECTED and isinstance(odd.error, InvalidRequestError)
    assert good.text == "aa"


@pytest.mark.parametrize("priority", [["a"], {}, NoRepr(), 3, "unknown"], ids=["list", "dict", "odd", "number", "name"])
def test_an_odd_priority_is_rejected_and_the_loop_goes_on(priority: Any) -> None:
    async def serve() -> list[Any]:
        async with AsyncOmni(text_config()) as omni:
            bad = {"prompt": "x", "priority": priority}
            return list(await asyncio.gather(omni.generate(bad), omni.generate("a"), omni.generate("b")))

    bad, *good = asyncio.run(serve())
    assert bad.status is RequestStatus.REJECTED and str(bad.error).startswith("priority: got ")
    assert [output.text for output in good] == ["aa", "bb"]
    with Omni(text_config()) as omni:
        outputs = omni.generate([{"prompt": "x", "priority": priority}, "a"], TextParams(steps=1))
    assert outputs[0].status is RequestStatus.REJECTED and outputs[1].text == "a"


def test_who_keeps_the_error_of_a_refused_request_keeps_nothing_that_was_read() -> None:
    read: weakref.WeakSet[Part] = weakref.WeakSet()

    class Part(dict[str, Any]):
        __hash__ = object.__hash__  # type: ignore[assignment]

    class Parts(Endless):
        def __iter__(self) -> Iterator[Any]:
            while True:
                part = Part(type="text", text="x")
                if len(read) < 100:
                    read.add(part)
                yield part

    with Omni(text_config()) as omni:
        gc.disable()
        try:
            (output,) = omni.generate([[{"role": "user", "content": Parts()}]])
            assert isinstance(output.error, InvalidRequestError)
            assert len(read) <= 1, "the frames that the error went through keep what they read"
        finally:
            gc.enable()


def test_no_message_is_long_or_cannot_be_printed() -> None:
    with Omni(text_config()) as omni:
        outputs = omni.generate(
            [{"prompt": "x", "k" * 5000: 1}, {"prompt": "x", "\ud800": 1}, {"prompt": "x", "priority": "p" * 5000}]
        )
    for output in outputs:
        assert isinstance(output.error, OmniError) and len(str(output.error)) <= MAX_MESSAGE
        str(output.error).encode("utf-8")


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = str(StageError("begin" + "x" * 10_000 + "end"))
    assert message.startswith("begin") and message.endswith("end") and "more" in message
    assert len(message) <= MAX_MESSAGE and str(OmniError("short")) == "short" and OmniError().args == ()
