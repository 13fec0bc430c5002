"""Routing of tasks to replicas, and which of those that were lost are run again: state machines under random use."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_omni.core.routing.replica_router import MAX_HOMES, MAX_LEAD, ReplicaRouter
from vllm_omni.core.routing.retries import Retries
from vllm_omni.errors import SchedulerError

sizes = st.floats(0, 100)
steps = st.lists(
    st.tuples(st.sampled_from(("assign", "finish", "open", "close")), st.integers(0, 7), sizes), max_size=80
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), steps)
def test_a_task_goes_to_an_open_replica_with_the_least_outstanding_work(num_replicas: int, plan: list[Any]) -> None:
    router, work = ReplicaRouter(num_replicas), [0.0] * num_replicas
    is_open, tasks = [True] * num_replicas, dict[str, tuple[int, float]]()
    for number, (do, which, size) in enumerate(plan):
        replica = which % num_replicas
        if do == "assign":
            avoid = {replica} if which > 5 else set()
            found = router.assign(str(number), size, avoid=avoid)
            allowed = [each for each in range(num_replicas) if is_open[each] and each not in avoid]
            assert (found is None) == (not allowed)
            if found is not None:
                assert found in allowed and work[found] <= min(work[each] for each in allowed) + 1e-6
                work[found] += max(size, 1e-3)
                tasks[str(number)] = (found, max(size, 1e-3))
        elif do == "finish" and tasks:
            name = list(tasks)[which % len(tasks)]
            router.finish(name)
            given_to, its_size = tasks.pop(name)
            work[given_to] -= its_size
        else:
            is_open[replica] = do == "open"
            router.set_open(replica, is_open[replica])
        router.check_integrity()
        assert [router.outstanding(each) for each in range(num_replicas)] == pytest.approx(work, abs=1e-6)


def test_equal_replicas_take_turns() -> None:
    router = ReplicaRouter(3)
    found = []
    for number in range(6):
        found.append(router.assign(str(number), 1.0))
        router.finish(str(number))
    assert found == [0, 1, 2, 0, 1, 2]


def test_a_task_goes_where_its_prefix_is_until_that_replica_is_too_far_ahead() -> None:
    router = ReplicaRouter(3)
    assert router.assign("first", 1.0, (11, 12)) == 0
    found = [router.assign(str(number), 1.0, (11, 12)) for number in range(6)]
    assert found[:4] == [0] * int(MAX_LEAD), "it is ahead of the idlest by no more than the bound"
    assert found[4] != 0 and found[5] == found[4], "the next one has another home, which is idler"
    assert router.assign("other", 1.0, (99,)) == 3 - found[4], "the idlest"


def test_the_longest_prefix_counts_and_closed_or_rebuilt_replicas_hold_none() -> None:
    router = ReplicaRouter(3)
    router.assign("a", 1.0, (1, 2))
    router.assign("b", 1.0, (1,), avoid={0})
    assert router.assign("c", 1.0, (1, 2, 3)) == 0
    router.set_open(0, False)
    assert router.assign("d", 1.0, (1, 2, 3)) == 1, "whoever holds the shorter one"
    router.set_open(0, True)
    router.forget(1)
    router.forget(0)
    assert router.assign("e", 0.001, (1, 2, 3)) == 2


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.core.routing.replica_router.MAX_PREFIXES", 10)
    router = ReplicaRouter(100)
    for number in range(1000):
        router.assign(str(number), 1.0, (number, -1))
        router.finish(str(number - 200))
    assert len(router._homes) == 10 and len(router._homes[-1]) == MAX_HOMES
    assert len(router._heap) <= 4 * 100 + 17
    with pytest.raises(SchedulerError, match="with replica"):
        router.assign("999", 1.0)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.sets(st.integers(0, 8), max_size=3), st.randoms(use_true_random=False))
def test_whoever_breaks_each_engine_ends_and_everybody_else_finishes(
    num_replicas: int, num_tasks: int, poisonous: set[int], random: Any
) -> None:
    """Each turn of this loop begins what may begin, then a poisonous task breaks its replica, or one finishes."""
    retries, waiting = Retries(), [str(number) for number in range(num_tasks)]
    poison = {str(number) for number in poisonous} & set(waiting)
    running: dict[str, int] = {}
    finished, ended, num_breaks = set[str](), set[str](), 0
    while waiting or running:
        for task in list(waiting):
            allowed = sorted(set(range(num_replicas)) - set(retries.closed_to(task)))
            if allowed:
                running[task] = random.choice(allowed)
                retries.begin(task, running[task])
                waiting.remove(task)
        task = random.choice(sorted(running))
        if task in poison:
            lost = {each for each, replica in running.items() if replica == running[task]}
            again = retries.lose(running[task], lost)
            num_breaks += 1
            for each in lost:
                del running[each]
                if each not in again:
                    ended.add(each)
                    retries.end(each)
            waiting += sorted(again)
        else:
            retries.acquit(task)
            if random.random() < 0.5:
                del running[task]
                retries.end(task)
                finished.add(task)
    assert poison <= ended and retries.num_known == 0 and not retries._trials
    if len(poison) == 1:
        assert ended == poison and num_breaks <= 3, "alone it is known at once, in company after one more run"
    assert num_breaks <= 3 * len(poison) + len(ended)


def test_a_task_alone_is_run_again_once() -> None:
    retries = Retries()
    assert retries.lose(0, {"a"}) == {"a"}
    retries.begin("a", 1)
    assert retries.lose(1, {"a"}) == set() and retries.total == 1
