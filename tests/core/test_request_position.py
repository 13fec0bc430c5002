"""Where a request is, while it waits, while it runs, and when it has ended."""

from __future__ import annotations

from support.scheduler import finish, request, scheduler

from vllm_omni.core.routing.request_plan import RequestPlan, StagePlan
from vllm_omni.params import StageParams
from vllm_omni.request import RequestStatus

ONE_STAGE = {"a": StagePlan(StageParams())}


def test_a_request_is_found_where_it_is() -> None:
    machine = scheduler(max_running=1)
    for name in ("first", "second", "third"):
        machine.schedule(request(name), RequestPlan(ONE_STAGE, {"a": frozenset()}))
    (launch,) = machine.tick(0.0)
    running, second, third = (machine.find(name) for name in ("first", "second", "third"))
    assert running is not None and running.status is RequestStatus.RUNNING and running.running == ("a",)
    assert second is not None and (second.status, second.num_ahead) == (RequestStatus.WAITING, 0)
    assert third is not None and third.num_ahead == 1
    finish(machine, launch)
    assert machine.find("first") is None and machine.find("nobody") is None
