from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni import registry
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import SchedulerConfig, SchedulerType
from vllm_omni.core.routing.policies import make_policy
from vllm_omni.errors import ConfigError


@dataclass(frozen=True)
class Job:
    order: int
    priority: str = "normal"
    job_size: float = 1.0
    admitted_s: float = 0.0


def policy(kind: SchedulerType | str):
    return make_policy(SchedulerConfig(policy=kind))


def start_order(kind: SchedulerType, jobs: list[Job], now: float) -> list[int]:
    chosen, left = [], list(jobs)
    while left:
        job = policy(kind).pick(left, now)
        left.remove(job)
        chosen.append(job.order)
    return chosen


jobs = st.lists(
    st.builds(
        Job,
        order=st.integers(0, 10**6),
        priority=st.sampled_from(["high", "normal", "low"]),
        job_size=st.floats(0, 1e6),
        admitted_s=st.floats(0, 1e4),
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda job: job.order,
)


@given(jobs, st.sampled_from(list(SchedulerType)))
def test_every_policy_starts_everyone_once(jobs: list[Job], kind: SchedulerType) -> None:
    assert sorted(start_order(kind, jobs, 1e4)) == sorted(job.order for job in jobs)


@given(jobs)
def test_fifo_is_the_order_of_admission(jobs: list[Job]) -> None:
    order = start_order(SchedulerType.FIFO, jobs, 1e4)
    assert order == sorted(order)


def test_priority_picks_the_largest_weight_times_time_waited() -> None:
    normal, high = Job(0, admitted_s=0.0), Job(1, "high", admitted_s=8.0)
    assert policy(SchedulerType.PRIORITY).pick([normal, high], now=10.0) is normal  # 10 against 4 * 2
    assert policy(SchedulerType.PRIORITY).pick([normal, high], now=11.0) is high  # 11 against 4 * 3


def test_priority_decides_by_weight_when_nobody_has_waited() -> None:
    waiting = [Job(0, "low"), Job(1, "normal"), Job(2, "high"), Job(3, "high")]
    assert start_order(SchedulerType.PRIORITY, waiting, 0.0) == [2, 3, 1, 0]


def test_shortest_job_first_picks_the_smallest_of_equally_old_jobs() -> None:
    waiting = [Job(0, job_size=9.0), Job(1, job_size=1.0), Job(2, job_size=4.0)]
    assert start_order(SchedulerType.SHORTEST_JOB_FIRST, waiting, 5.0) == [1, 2, 0]


@pytest.mark.parametrize("kind", list(SchedulerType))
def test_nobody_starves_while_better_requests_keep_arriving(kind: SchedulerType) -> None:
    patient = Job(0, "low", job_size=100.0, admitted_s=0.0)
    for second in range(1, 1000):
        rival = Job(second, "high", job_size=1.0, admitted_s=second - 1.0)
        if policy(kind).pick([patient, rival], now=float(second)) is patient:
            return
    pytest.fail("still waiting after 1000 rivals")


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="fifo_"):
        policy("fifo_")


class LastComeFirst:
    def __init__(self, config: SchedulerConfig) -> None: ...

    def pick(self, waiting, now):
        return max(waiting, key=lambda job: job.order)


def test_a_policy_of_ones_own_is_one_row_and_can_be_named_in_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TABLES, "scheduling policy", dict(registry.TABLES["scheduling policy"]))
    settings = ["scheduler.policy=last_come_first"]
    with pytest.raises(ConfigError, match=r"scheduler\.policy: got 'last_come_first', expected one of 'fifo'"):
        load_config("tiny_image", settings)
    registry.register("scheduling policy", "last_come_first", f"{__name__}:LastComeFirst")
    chosen = make_policy(load_config("tiny_image", settings).scheduler)
    assert chosen.pick([Job(0), Job(1)], 0.0) == Job(1)
