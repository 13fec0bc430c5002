"""Iterators of text through the whole graph: sound before the last word, and what breaks a text off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import make_model_folder
from support.qwen3_tts import cases, write_folder
from support.talkers import GREEDY_FIELDS, fields_of

from vllm_omni import AsyncOmni, Omni, OmniRequest, SamplingParams
from vllm_omni.errors import InvalidRequestError, OmniError, RequestTimeoutError
from vllm_omni.output import OmniOutput, RequestStatus

CASE = cases()["speaker"]
PARAMS = SamplingParams(temperature=0, max_tokens=12, min_tokens=12)
FIELDS = {**GREEDY_FIELDS, **fields_of(CASE)}
PATIENCE_S = 30
OVERRIDES = ["outputs=[speech, talker.codes]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("speaker"), CASE.task)


@pytest.fixture(scope="module")
def omni(folder: Path) -> Iterator[Omni]:
    with Omni(model=str(folder), overrides=OVERRIDES, device="cpu", dtype="float32", progress=False) as omni:
        yield omni


@pytest.fixture(scope="module")
def codes(omni: Omni) -> torch.Tensor:
    """Of the whole text."""
    return omni.generate({"prompt": CASE.text, **FIELDS}, PARAMS)[0].tensors["talker.codes"]


class Words:
    """Two pieces; the second is not given before `go_on` is set."""

    def __init__(self, first: str = CASE.text[:9], second: str = CASE.text[9:]) -> None:
        self.go_on = threading.Event()
        self.closed = threading.Event()
        self._pieces = (first, second)

    def __iter__(self) -> Iterator[str]:
        try:
            yield self._pieces[0]
            assert self.go_on.wait(PATIENCE_S), "nothing was heard"
            yield self._pieces[1]
        finally:
            self.closed.set()

    async def asynchronously(self) -> AsyncIterator[str]:
        try:
            yield self._pieces[0]
            while not self.go_on.is_set():
                await asyncio.sleep(0.001)
            yield self._pieces[1]
        finally:
            self.closed.set()


def prompt(pieces: Any, **fields: Any) -> dict[str, Any]:
    return {"prompt": pieces, **FIELDS, **fields}


def assert_idle(omni: Omni) -> None:
    assert not omni._executor.has_work() and not omni._executor._texts
    omni._executor.check_integrity()


def test_sound_goes_out_before_the_last_word_comes(omni: Omni, codes: torch.Tensor) -> None:
    words, num_heard = Words(), 0
    for part in omni.stream(prompt(iter(words)), PARAMS):
        if part.audios and not part.finished:
            num_heard += not words.go_on.is_set()
            words.go_on.set()
    assert num_heard and part.error is None, part.error
    assert torch.equal(part.tensors["talker.codes"], codes)
    assert words.closed.wait(PATIENCE_S)
    assert_idle(omni)


def test_lists_of_texts_in_pieces_are_said_as_whole_ones(omni: Omni, codes: torch.Tensor) -> None:
    prompts = [prompt(iter(CASE.text)), prompt(iter(["", CASE.text, ""])), prompt(CASE.text)]
    for output in omni.generate(prompts, PARAMS):
        assert output.error is None and torch.equal(output.tensors["talker.codes"], codes)
    (plain,) = omni.generate([iter(["Hello ", "world"])], PARAMS)
    assert plain.error is None and plain.audios


def broken() -> Iterator[str]:
    yield "Hello world, "
    raise OSError("the writer is gone")


def left() -> Iterator[str]:
    yield "Hello world, "
    raise SystemExit("the writer leaves")


class Untidy:
    """Its generator cannot be closed in peace."""

    def pieces(self) -> Iterator[Any]:
        try:
            yield from ("Hello ", 3)
        finally:
            raise OSError("nothing to close")


@pytest.mark.parametrize(
    ("pieces", "fields", "words"),
    [
        (iter([]), {}, "expected words that are to be said"),
        (iter(["a b " * 25_001]), {}, "expected at most 100000"),
        (iter(["Hello ", 3]), {}, "got a piece that is a int, expected a string"),
        (broken(), {}, "the iterator raised OSError: the writer is gone"),
        (left(), {"timeout_s": 20.0}, "the iterator raised SystemExit: the writer leaves"),
        (Untidy().pieces(), {"timeout_s": 20.0}, "the iterator raised OSError: nothing to close"),
        (Words().asynchronously(), {}, "got an asynchronous iterator"),
        (iter(["Hello"]), {"non_streaming_mode": True}, "non_streaming_mode: got true with a text in pieces"),
        (iter(["Hello"]), {"voice": "nobody"}, "voice"),
    ],
)
def test_what_cannot_be_said_in_pieces_is_refused(omni: Omni, pieces: Any, fields: dict[str, Any], words: str) -> None:
    (output,) = omni.generate({**prompt(pieces), **fields} | ({"speaker": None} if "voice" in fields else {}), PARAMS)
    assert isinstance(output.error, InvalidRequestError) and words in str(output.error), output.error
    assert_idle(omni)


def test_a_text_that_nobody_brings_is_not_waited_for(omni: Omni) -> None:
    (output,) = omni.generate(OmniRequest(prompt="", is_open=True, timeout_s=20.0))
    assert output.status is RequestStatus.REJECTED and "is_open: got true without pieces" in str(output.error)


def test_a_stage_that_reads_its_text_whole_refuses_pieces(tmp_path: Path) -> None:
    with Omni(model=str(make_model_folder(tmp_path)), device="cpu", progress=False) as omni:
        (output,) = omni.generate([iter(["Hello"])])
    assert output.status is RequestStatus.REJECTED and "reads it whole; give one string" in str(output.error)


def test_a_piece_after_the_last_ends_the_request(omni: Omni) -> None:
    executor = omni._executor
    executor.add_request(OmniRequest(prompt="", is_open=True, request_id="long"))
    executor.extend("long", "Hello world.", is_last=True)
    executor.step()
    executor.extend("long", " Hello.", is_last=True)
    executor.extend("nobody", " Hello.", is_last=True)
    (output,) = executor.take_outputs()
    assert isinstance(output.error, InvalidRequestError) and "after the last one" in str(output.error)
    assert_idle(omni)


def test_the_deadline_holds_for_the_caller_too(omni: Omni) -> None:
    words = Words()
    (output,) = omni.generate(prompt(iter(words), timeout_s=0.3), PARAMS)
    assert isinstance(output.error, RequestTimeoutError) and len(output.audios[0].samples[0]) > 0
    words.go_on.set()
    assert words.closed.wait(PATIENCE_S)
    assert_idle(omni)


def test_whoever_leaves_between_two_pieces_leaves_nothing_behind(omni: Omni) -> None:
    words = Words()
    parts = omni.stream(prompt(iter(words)), PARAMS)
    assert next(part for part in parts if part.audios)
    parts.close()
    assert_idle(omni)
    words.go_on.set()
    assert words.closed.wait(PATIENCE_S)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_asyncio_callers_give_asynchronous_iterators(folder: Path, codes: torch.Tensor, executor: str) -> None:
    """Others go on while one waits for its next word; whoever leaves closes the iterator."""

    async def talk(omni: AsyncOmni) -> None:
        words, left = Words(), Words()
        leaving = omni.stream(prompt(left.asynchronously()), PARAMS)
        assert [part async for part in _until_sound(leaving)]
        async with aclosing(omni.stream(prompt(words.asynchronously()), PARAMS)) as parts:
            heard = [part async for part in _until_sound(parts)]
            other = await omni.generate(prompt(CASE.text), PARAMS)
            assert torch.equal(other.tensors["talker.codes"], codes)
            await leaving.aclose()
            words.go_on.set()
            heard += [part async for part in parts]
        assert torch.equal(heard[-1].tensors["talker.codes"], codes)
        while not left.closed.is_set():
            await asyncio.sleep(0.001)
        refused = await omni.generate(prompt(iter("Hello")), PARAMS)
        assert isinstance(refused.error, OmniError) and "got a plain iterator" in str(refused.error)

    async def main() -> None:
        overrides = [*OVERRIDES, f"talker.executor={executor}"]
        async with AsyncOmni(model=str(folder), overrides=overrides, device="cpu", dtype="float32") as omni:
            await asyncio.wait_for(talk(omni), PATIENCE_S)

    asyncio.run(main())


@pytest.fixture
def run_async(folder: Path) -> Callable[[Callable[[AsyncOmni], Awaitable[None]]], None]:
    def run(work: Callable[[AsyncOmni], Awaitable[None]]) -> None:
        async def main() -> None:
            async with AsyncOmni(model=str(folder), overrides=OVERRIDES, device="cpu", dtype="float32") as omni:
                await asyncio.wait_for(work(omni), PATIENCE_S)

        asyncio.run(main())

    return run


def test_pieces_go_to_their_own_request_also_where_another_has_its_id(run_async: Any, codes: torch.Tensor) -> None:
    """One that is refused, since its id is in use, reads on until its caller looks: here two texts, one of which
    breaks off.
    """

    async def intruding() -> AsyncIterator[str]:
        yield "something else "
        raise OSError("no more")

    async def talk(omni: AsyncOmni) -> None:
        words = Words()
        async with aclosing(omni.stream(prompt(words.asynchronously(), request_id="same"), PARAMS)) as parts:
            heard = [part async for part in _until_sound(parts)]
            second = await omni.generate(prompt(intruding(), request_id="same"), PARAMS)
            assert second.status is RequestStatus.REJECTED and "same" in str(second.error)
            third = omni.stream(prompt(intruding(), request_id="same"), PARAMS)
            assert (await anext(third)).status is RequestStatus.REJECTED
            await asyncio.sleep(0.05)
            await third.aclose()
            words.go_on.set()
            heard += [part async for part in parts]
        assert heard[-1].error is None, heard[-1].error
        assert torch.equal(heard[-1].tensors["talker.codes"], codes)

    run_async(talk)


def test_a_cancelled_task_of_the_iterator_ends_the_request(run_async: Any) -> None:
    async def cancelled() -> AsyncIterator[str]:
        yield "Hello "
        waiting = asyncio.ensure_future(asyncio.sleep(PATIENCE_S))
        asyncio.get_running_loop().call_soon(waiting.cancel)
        await waiting
        yield "world"

    async def talk(omni: AsyncOmni) -> None:
        output = await omni.generate(prompt(cancelled(), timeout_s=20.0), PARAMS)
        assert isinstance(output.error, InvalidRequestError) and "CancelledError" in str(output.error), output.error

    run_async(talk)


def test_an_iterator_that_never_waits_lets_others_have_their_turn(run_async: Any) -> None:
    async def endless() -> AsyncIterator[str]:
        for _ in range(100_000):  # were it endless, a failure of this test would be, too
            yield "a b c d e " * 20

    async def talk(omni: AsyncOmni) -> None:
        output = await omni.generate(prompt(endless()), SamplingParams(max_tokens=4000))
        assert isinstance(output.error, InvalidRequestError) and "expected at most 100000" in str(output.error)

    run_async(talk)


async def _until_sound(parts: AsyncIterator[OmniOutput]) -> AsyncIterator[OmniOutput]:
    async for part in parts:
        yield part
        if part.audios:
            return
