"""Whatever raises, wherever and however often: one final output for each request, nothing left, and then it works."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.haunted_engine import HAUNTING, PLACES, haunted_config
from support.loop import Clock, request
from support.toy_engine import TextParams

from vllm_omni.errors import OmniError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, RequestStatus

Plans = dict[str, frozenset[int]]
plans = st.dictionaries(st.sampled_from(PLACES), st.frozensets(st.integers(0, 12), max_size=8))
requests = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4), st.booleans()), min_size=1, max_size=10)


def check_ends(outputs: list[OmniOutput], num_requests: int) -> None:
    finals = [output for output in outputs if output.finished]
    assert Counter(output.request_id for output in finals) == Counter(str(index) for index in range(num_requests))
    for output in finals:
        assert (output.error is None) == (output.status is RequestStatus.FINISHED)
        assert output.error is None or isinstance(output.error, OmniError)
        assert output.error is not None or output.text == output.request_id * len(output.text or "")


def works_again(loop: OmniExecutor, clock: Any) -> bool:
    """Whether a request is answered once the plan is over and the longest pause has passed."""
    HAUNTING.begin({})
    loop.add_request(request("refused, perhaps"))
    while loop.has_work():
        loop.step()
        clock()
    for _ in range(200):
        if not loop.is_mending:
            break
        clock()
        loop.step()
    loop.add_request(request("after"))
    outputs: list[OmniOutput] = []
    while loop.has_work():
        outputs += loop.step()
        loop.wait()
    loop.check_integrity()
    return [output.error for output in outputs if output.finished] == [None]


@settings(max_examples=15, deadline=None)
@given(plans, requests, st.booleans())
def test_inline(plan: Plans, asked: list[Any], is_streamed: bool) -> None:
    HAUNTING.begin({})
    clock = Clock()
    loop = OmniExecutor(Pipeline(haunted_config(worker_timeout=50.0)), clock=clock)
    HAUNTING.begin(plan)
    outputs: list[OmniOutput] = []
    for index, (steps, pause, is_aborted) in enumerate(asked):
        loop.add_request(request(str(index), str(index), params=TextParams(steps=steps)), stream=is_streamed)
        for _ in range(pause):
            outputs += loop.step()
            clock.now += 0.2
        if is_aborted:
            loop.abort(str(index))
    until = clock.now + 60.0
    while clock.now < until and (loop.has_work() or loop.scheduler.in_flight()):
        outputs += loop.step()
        clock.now += 0.2
    assert not loop.has_work() and loop.scheduler.in_flight() == set()
    assert not any(loop._outbox.is_watched(str(index)) for index in range(len(asked)))
    check_ends(outputs, len(asked))

    def tick() -> None:
        clock.now += 1.0

    assert works_again(loop, tick)


@settings(max_examples=10, deadline=None)
@given(plans, requests)
def test_in_a_thread(plan: Plans, asked: list[Any]) -> None:
    HAUNTING.begin({})
    clock = Clock()
    loop = OmniExecutor(Pipeline(haunted_config("thread", worker_timeout=5.0)), clock=clock)
    HAUNTING.begin(plan)
    outputs: list[OmniOutput] = []
    for index, (steps, pause, is_aborted) in enumerate(asked):
        loop.add_request(request(str(index), str(index), params=TextParams(steps=steps)))
        for _ in range(pause):
            outputs += loop.step()
        if is_aborted:
            loop.abort(str(index))
    until = time.monotonic() + 20.0
    while loop.has_work():
        outputs += loop.step()
        loop.wait()
        clock.now += 0.1 if loop.is_mending else 0.001  # tasks wait for a rebuild
        assert time.monotonic() < until, loop.get_status()
    check_ends(outputs, len(asked))

    def tick() -> None:
        clock.now += 1.0
        time.sleep(0.002)

    assert works_again(loop, tick)
    loop.shutdown()


@pytest.mark.parametrize("place", PLACES)
def test_each_place_alone_harms_no_other_stage_and_heals(place: str) -> None:
    HAUNTING.begin({})
    clock = Clock()
    loop = OmniExecutor(Pipeline(haunted_config()), clock=clock)
    HAUNTING.begin({place: frozenset(range(3)), "step": frozenset({0, 1})})
    outputs: list[OmniOutput] = []
    for index in range(4):
        loop.add_request(request(str(index), str(index)))
        for _ in range(8):
            outputs += loop.step()
            clock.now += 0.5
    check_ends(outputs, 4)

    def tick() -> None:
        clock.now += 1.0

    assert HAUNTING.num_raised >= 2 and works_again(loop, tick)
