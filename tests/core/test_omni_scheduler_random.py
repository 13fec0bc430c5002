from __future__ import annotations

import dataclasses
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from support.scheduler import cached_plan, finish, request, run_to_end, scheduler

from vllm_omni.config.schema import (
    SchedulerConfig,
    SchedulerType,
)
from vllm_omni.errors import (
    QueueFullError,
    StageError,
)
from vllm_omni.messages import StageTask


class Requests(RuleBasedStateMachine):
    """Random admissions, launches, ends and changes: every admitted request has exactly one end."""

    launches = Bundle("launches")

    def __init__(self) -> None:
        super().__init__()
        self.machine = scheduler(max_queue_size=4, max_running=3)
        self.now = 0.0
        self.count = 0
        self.admitted: list[str] = []
        self.ended: Counter[str] = Counter()

    @rule(
        priority=st.sampled_from(["high", "normal", "low"]),
        timeout_s=st.sampled_from([1.0, 5.0, 100.0]),
        key=st.sampled_from([None, "k", "l"]),
    )
    def schedule(self, priority: str, timeout_s: float, key: str | None) -> None:
        self.count += 1
        name = f"r{self.count}"
        try:
            plan = None if key is None else cached_plan(key)
            self.machine.schedule(request(name, priority=priority, timeout_s=timeout_s), plan, now=self.now)
            self.admitted.append(name)
        except QueueFullError:
            assert self.machine.get_status()["queue_size"] >= self.machine.get_config().scheduler.max_queue_size

    @rule(target=launches)
    def tick(self):
        return multiple(*self.machine.tick(self.now))

    @rule(seconds=st.floats(0.1, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(launch=consumes(launches))
    def done(self, launch: StageTask) -> None:
        finish(self.machine, launch, self.now)

    @rule(launch=launches)
    def done_perhaps_twice(self, launch: StageTask) -> None:
        finish(self.machine, launch, self.now)

    @rule(launch=consumes(launches))
    def failed(self, launch: StageTask) -> None:
        self.machine.stage_failed(launch.request.request_id, launch.stage, StageError("no"))

    @rule(index=st.integers(0, 50))
    def abort(self, index: int) -> None:
        self.machine.abort(f"r{index}")

    @rule(policy=st.sampled_from(list(SchedulerType)), max_running=st.integers(1, 4), size=st.integers(1, 5))
    def change(self, policy: SchedulerType, max_running: int, size: int) -> None:
        new = SchedulerConfig(policy=policy, max_running=max_running, max_queue_size=size)
        self.machine.update_config(dataclasses.replace(self.machine.get_config(), scheduler=new))

    @precondition(lambda self: self.count > 3)
    @rule()
    def shut_down_and_start_again(self) -> None:
        self.machine.shutdown()
        self.machine.start()

    @rule()
    def take_ends(self) -> None:
        self.ended.update(end.request.request_id for end in self.machine.take_ends())

    @invariant()
    def integrity(self) -> None:
        self.machine.check_integrity()
        status = self.machine.get_status()
        assert status["processed_requests"] + status["queue_size"] + status["running_requests"] == len(self.admitted)

    def teardown(self) -> None:
        run_to_end(self.machine, self.now)
        self.machine.shutdown()
        self.take_ends()
        assert self.ended == Counter(self.admitted)
        assert self.machine.in_flight() == set() and not self.machine.has_work


Requests.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRandomOperations = Requests.TestCase
