from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from support.scheduler import (
    cached_plan,
    diamond,
    finish,
    payload,
    reader,
    request,
    run_to_end,
    scheduler,
    stages_of,
)

from vllm_omni.config.graph import Edge
from vllm_omni.config.schema import (
    DiTCacheConfig,
    LimitsConfig,
    OmniConfig,
    SchedulerConfig,
    SchedulerType,
)
from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.core.routing.request_plan import RequestPlan, StagePlan
from vllm_omni.errors import (
    ConfigError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    SchedulerError,
    StageError,
)
from vllm_omni.messages import StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload
from vllm_omni.request import RequestStatus, create_text_request
from vllm_omni.utils.device_memory import HANDLE_BYTES, DeviceHandle, FarTensor

# Alone, without stages


def test_it_works_alone_and_only_queues() -> None:
    machine = OmniScheduler(OmniConfig())
    machine.start()
    machine.start()
    assert machine.schedule(create_text_request("hi")) is True
    assert machine.tick(0.0) == []
    status = machine.get_status()
    assert (status["queue_size"], status["running_requests"], status["processed_requests"]) == (1, 0, 0)
    assert status["running"] is True and status["cache_hit_rate"] == 0.0
    machine.stop()
    assert machine.get_status()["running"] is False
    with pytest.raises(SchedulerError, match="stopped"):
        machine.schedule(create_text_request("hi"))
    machine.shutdown()
    assert [end.status for end in machine.take_ends()] == [RequestStatus.ABORTED]
    machine.check_integrity()


def test_it_accepts_before_start_and_again_after_stop() -> None:
    machine = OmniScheduler(OmniConfig())
    assert machine.schedule(request("a"))
    machine.stop()
    machine.start()
    assert machine.schedule(request("b"))


def test_a_full_queue_is_said_and_nothing_is_taken() -> None:
    machine = OmniScheduler(OmniConfig(scheduler=SchedulerConfig(max_queue_size=2)))
    machine.schedule(request("a"))
    machine.schedule(request("b"))
    with pytest.raises(QueueFullError, match="max_queue_size"):
        machine.schedule(request("c"))
    assert machine.get_status()["queue_size"] == 2
    machine.abort("a")
    machine.schedule(request("c"))
    machine.check_integrity()


def test_running_requests_do_not_count_against_the_queue() -> None:
    machine = scheduler(max_queue_size=1, max_running=1)
    machine.schedule(request("a"))
    machine.tick(0.0)
    machine.schedule(request("b"))
    with pytest.raises(QueueFullError):
        machine.schedule(request("c"))


def test_an_id_is_free_again_once_its_end_was_taken() -> None:
    machine = scheduler()
    machine.schedule(request("a"))
    with pytest.raises(SchedulerError, match="in use"):
        machine.schedule(request("a"))
    machine.abort("a")
    with pytest.raises(SchedulerError, match="in use"):
        machine.schedule(request("a"))
    machine.take_ends()
    assert machine.schedule(request("a"))


def test_an_unknown_priority_is_refused_with_the_near_one() -> None:
    with pytest.raises(SchedulerError, match="did you mean 'high'"):
        scheduler().schedule(request("a", priority="hihg"))


def test_a_bad_config_is_refused_at_construction() -> None:
    with pytest.raises(ConfigError, match="max_queue_size"):
        OmniScheduler(OmniConfig(scheduler=SchedulerConfig(max_queue_size=0)))


# Routing


def test_stages_launch_when_their_inputs_are_complete() -> None:
    machine = scheduler()
    machine.schedule(request())
    (a,) = machine.tick(0.0)
    assert a.stage == "a" and machine.tick(0.0) == []
    finish(machine, a)
    b, c = machine.tick(0.0)
    assert stages_of([b, c]) == ["b", "c"]
    finish(machine, b)
    assert machine.tick(0.0) == []
    finish(machine, c)
    (d,) = machine.tick(0.0)
    assert sorted(d.inputs) == ["x", "y"]
    assert machine.take_ends() == []
    finish(machine, d)
    (end,) = machine.take_ends()
    assert end.status is RequestStatus.FINISHED and end.error is None
    assert set(end.payloads) == {"a", "d"}
    assert set(end.payloads["a"].tensors) == {"extra"} and set(end.payloads["d"].tensors) == {"out"}
    assert machine.get_status()["processed_requests"] == 1
    machine.check_integrity()


def test_tensors_pass_by_reference() -> None:
    machine = scheduler()
    machine.schedule(request())
    (a,) = machine.tick(0.0)
    made = payload(a)
    machine.stage_done("r", "a", made, {}, 0.0)
    assert all(launch.inputs["x"] is made.tensors["out"] for launch in machine.tick(0.0))


def test_a_tensor_is_let_go_when_its_last_reader_has_taken_it() -> None:
    machine = scheduler()
    plan = RequestPlan(
        {
            "a": StagePlan(StageParams()),
            "b": reader(b="a"),
            "c": StagePlan(StageParams(), (Edge("a", "out", "c", "x"), Edge("b", "out", "c", "y"))),
        },
        {"c": frozenset({"out"})},
    )
    machine.schedule(request(), plan)
    (a,) = machine.tick(0.0)
    made = payload(a)
    alive = weakref.ref(made.tensors["out"])
    unread = weakref.ref(made.tensors["extra"])
    machine.stage_done("r", "a", made, {}, 0.0)
    del made
    gc.collect()
    assert unread() is None, "nobody reads this output, so nobody may hold it"
    (b,) = machine.tick(0.0)
    finish(machine, b)
    del b
    gc.collect()
    assert alive() is not None, "c has yet to read it"
    (c,) = machine.tick(0.0)
    del c
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("ending", ["abort", "fail", "shutdown", "deadline"])
def test_an_early_end_lets_go_of_every_tensor(ending: str) -> None:
    machine = scheduler(diamond(("d",)))
    machine.schedule(request(timeout_s=5.0))
    (a,) = machine.tick(0.0)
    made = payload(a)
    alive = weakref.ref(made.tensors["out"])
    machine.stage_done("r", "a", made, {}, 0.0)
    del made
    if ending == "abort":
        machine.abort("r")
    elif ending == "fail":
        machine.fail("r", StageError("no"))
    elif ending == "shutdown":
        machine.shutdown()
    else:
        machine.tick(5.0)
    gc.collect()
    assert alive() is None
    assert len(machine.take_ends()) == 1


def test_only_what_a_plan_reads_is_awaited() -> None:
    machine = scheduler()
    plan = RequestPlan({"a": StagePlan(StageParams()), "d": reader(d="a")}, {"d": frozenset({"out"})})
    machine.schedule(request(), plan)
    run_to_end(machine)
    (end,) = machine.take_ends()
    assert end.status is RequestStatus.FINISHED and set(end.metrics) == {"a", "d"}


def test_a_missing_output_fails_the_request_and_names_both_stages() -> None:
    machine = scheduler()
    machine.schedule(request())
    machine.tick(0.0)
    machine.stage_done("r", "a", StagePayload("r", "a"), {}, 0.0)
    (end,) = machine.take_ends()
    assert end.status is RequestStatus.FAILED and isinstance(end.error, StageError)
    assert "'a' gave no 'out'" in str(end.error) and "'b'" in str(end.error)


def test_a_request_that_nothing_can_advance_fails_instead_of_waiting_for_ever() -> None:
    machine = scheduler()
    machine.schedule(request(), RequestPlan({"b": reader(b="a")}))
    assert machine.tick(0.0) == []
    (end,) = machine.take_ends()
    assert end.status is RequestStatus.FAILED and "stages b" in str(end.error)


def test_max_running_holds_and_the_policy_picks() -> None:
    machine = scheduler(policy=SchedulerType.SHORTEST_JOB_FIRST, max_running=1)
    for name, size in (("long", 9.0), ("short", 1.0), ("middle", 5.0)):
        plan = RequestPlan({"a": StagePlan(StageParams())}, {"a": frozenset()}, job_size=size)
        machine.schedule(request(name), plan)
    started = []
    while launches := machine.tick(0.0):
        (launch,) = launches
        started.append(launch.request.request_id)
        assert machine.get_status()["running_requests"] == 1
        finish(machine, launch)
    assert started == ["short", "middle", "long"]


# Ends


def test_a_failure_harms_nobody_else_and_abandons_the_other_stages() -> None:
    machine = scheduler()
    machine.schedule(request("bad"))
    machine.schedule(request("good"))
    for launch in machine.tick(0.0):
        finish(machine, launch)
    machine.tick(0.0)
    error = StageError("stage 'b' failed")
    machine.stage_failed("bad", "b", error)
    (end,) = machine.take_ends()
    assert (end.status, end.error, end.abandoned) == (RequestStatus.FAILED, error, ("c",))
    assert machine.in_flight() == {("good", "b"), ("good", "c")}
    machine.check_integrity()


def test_late_news_of_an_ended_request_is_dropped() -> None:
    machine = scheduler()
    machine.schedule(request())
    (a,) = machine.tick(0.0)
    machine.abort("r")
    finish(machine, a)
    machine.stage_failed("r", "a", StageError("late"))
    machine.stage_failed("unknown", "a", StageError("late"))
    (end,) = machine.take_ends()
    assert end.status is RequestStatus.ABORTED and isinstance(end.error, RequestAbortedError)
    assert machine.get_metrics()["stray_events"] == 3
    machine.check_integrity()


def test_a_stage_that_is_done_twice_counts_once() -> None:
    machine = scheduler()
    machine.schedule(request())
    (a,) = machine.tick(0.0)
    finish(machine, a)
    finish(machine, a)
    assert stages_of(machine.tick(0.0)) == ["b", "c"]
    machine.check_integrity()


@pytest.mark.parametrize("runs", [True, False])
def test_the_deadline_counts_from_admission_wherever_the_request_is(runs: bool) -> None:
    machine = scheduler(max_running=1, request_timeout=10.0)
    machine.schedule(request("first", timeout_s=100.0), now=0.0)
    machine.tick(0.0)
    if runs:
        machine.abort("first")
        machine.take_ends()
    machine.schedule(request("late"), now=5.0)
    machine.tick(14.9)
    assert machine.take_ends() == []
    machine.tick(15.0)
    (end,) = machine.take_ends()
    assert end.request.request_id == "late" and end.status is RequestStatus.FAILED
    assert isinstance(end.error, RequestTimeoutError) and "10 s" in str(end.error)
    assert end.abandoned == (("a",) if runs else ())


def test_stop_drains_and_shutdown_does_not() -> None:
    machine = scheduler(max_running=1)
    machine.schedule(request("a"))
    machine.schedule(request("b"))
    machine.tick(0.0)
    machine.stop()
    with pytest.raises(SchedulerError):
        machine.schedule(request("c"))
    finish(machine, StageTask(request("a"), "a", StageParams(), {}))
    run_to_end(machine)
    assert [end.status for end in machine.take_ends()] == [RequestStatus.FINISHED] * 2
    machine.start()
    machine.schedule(request("d"))
    machine.tick(0.0)
    machine.shutdown()
    assert [end.abandoned for end in machine.take_ends()] == [("a",)]
    assert not machine.has_work


def test_metrics_tell_when_a_stage_was_ready_started_and_done() -> None:
    machine = scheduler(diamond(("a", "d")))
    machine.schedule(request(), now=100.0)
    (a,) = machine.tick(103.0)
    machine.stage_done("r", "a", payload(a), {"steps": 7, "tokens": 3}, 108.0)
    run_to_end(machine, 110.0)
    (end,) = machine.take_ends()
    assert end.metrics["a"] == {"queued_s": 3.0, "started_s": 3.0, "ran_s": 5.0, "steps": 7, "tokens": 3}
    assert end.metrics["b"] == {"queued_s": 2.0, "started_s": 10.0, "ran_s": 0.0, "steps": 1}


# The cache across requests


def test_a_known_key_skips_the_stage_and_says_so() -> None:
    machine = scheduler()
    machine.schedule(request("first"), cached_plan("k"))
    run_to_end(machine)
    machine.schedule(request("second"), cached_plan("k"))
    (b,) = machine.tick(1.0)
    assert b.stage == "b" and b.inputs["x"].shape == (2,)
    finish(machine, b, 1.0)
    first, second = machine.take_ends()
    assert "cached" not in first.metrics["a"]
    expected = {"cached": True, "steps": 0, "ran_s": 0.0}
    assert {key: second.metrics["a"][key] for key in expected} == expected
    assert machine.get_status()["cache_hit_rate"] == 0.5


def test_a_cached_payload_bears_the_id_of_the_request_that_gets_it() -> None:
    machine = scheduler(diamond(("a", "d")))
    plan = RequestPlan({"a": StagePlan(StageParams(), cache_key=lambda task: "k")}, {"a": frozenset({"out"})})
    for name in ("first", "second"):
        machine.schedule(request(name), plan)
        run_to_end(machine)
    assert [end.payloads["a"].request_id for end in machine.take_ends()] == ["first", "second"]


def test_a_payload_that_was_lost_with_its_process_is_made_anew() -> None:
    gone = False
    handle = DeviceHandle("gpu", bytes(HANDLE_BYTES), 64, 0)
    far = FarTensor.of(handle, [2], torch.float32, lambda: gone)
    machine = scheduler()
    machine.schedule(request("first"), cached_plan("k"))
    machine.tick(0.0)
    machine.stage_done("first", "a", StagePayload("first", "a", {"out": far}), {}, 0.0)
    machine.schedule(request("second"), cached_plan("k"))
    assert stages_of(machine.tick(0.0)) == ["b", "b"]
    gone = True
    machine.schedule(request("third"), cached_plan("k"))
    assert stages_of(machine.tick(0.0)) == ["a"]


def test_another_key_or_a_failed_stage_is_no_hit() -> None:
    machine = scheduler()
    machine.schedule(request("first"), cached_plan("k"))
    machine.tick(0.0)
    machine.stage_failed("first", "a", StageError("no"))
    for name, key in (("second", "k"), ("third", "other")):
        machine.schedule(request(name), cached_plan(key))
        assert stages_of(machine.tick(0.0)) == ["a"]
        machine.abort(name)


def test_the_cache_stays_within_its_budget() -> None:
    machine = scheduler(dit_cache=DiTCacheConfig(prompt_embeds_mb=50 / 2**20))
    for index in range(10):
        machine.schedule(request(), cached_plan(str(index)))
        run_to_end(machine)
        machine.take_ends()
    stats = machine.get_metrics()["prompt_embeds"]
    assert 0 < stats["used_bytes"] <= 50 and stats["evictions"] == 8


def test_payloads_without_tensors_count_against_the_budget_too() -> None:
    machine = scheduler(dit_cache=DiTCacheConfig(prompt_embeds_mb=100 / 2**20))
    for index in range(30):
        plan = RequestPlan({"a": StagePlan(StageParams(), cache_key=lambda task, key=str(index): key)})
        machine.schedule(request(), plan)
        machine.tick(0.0)
        machine.stage_done("r", "a", StagePayload("r", "a", meta={"text": "x" * 20}), {}, 0.0)
        machine.take_ends()
    assert machine.get_metrics()["prompt_embeds"]["entries"] < 5


def test_a_key_that_cannot_be_made_fails_its_request_alone() -> None:
    def broken(inputs: object) -> str:
        raise StageError("no key")

    machine = scheduler()
    machine.schedule(request("bad"), RequestPlan({"a": StagePlan(StageParams(), cache_key=broken)}))
    machine.schedule(request("good"))
    assert stages_of(machine.tick(0.0)) == ["a"]
    (end,) = machine.take_ends()
    assert end.request.request_id == "bad" and end.abandoned == () and str(end.error) == "no key"


# Changing the configuration in flight


def test_update_config_changes_policy_and_limits_and_loses_nobody() -> None:
    machine = scheduler(max_queue_size=8, max_running=4)
    for index in range(8):
        machine.schedule(request(f"{index}", priority="high" if index == 6 else "normal"))
    machine.tick(0.0)
    new = SchedulerConfig(policy=SchedulerType.PRIORITY, max_queue_size=1, max_running=1)
    machine.update_config(dataclasses.replace(machine.get_config(), scheduler=new))
    assert machine.get_config().scheduler is new
    assert machine.get_status()["running_requests"] == 4 and machine.get_status()["queue_size"] == 4
    with pytest.raises(QueueFullError):
        machine.schedule(request("more"))
    for index in range(4):
        machine.abort(str(index))
    machine.tick(1.0)
    assert {name for name, _ in machine.in_flight()} == {"6"}
    machine.shutdown()
    assert len(machine.take_ends()) == 8


def test_update_config_refuses_what_it_cannot_honour() -> None:
    machine = scheduler()
    machine.schedule(request("a", priority="low"))
    config = machine.get_config()
    refused = [
        (dataclasses.replace(config, request_timeout=-1.0), "request_timeout_s"),
        (dataclasses.replace(config, limits=LimitsConfig(max_pixels=1)), "limits"),
        (dataclasses.replace(config, max_memory_gb=1.0), "max_memory_gb"),
        (dataclasses.replace(config, dit_cache=DiTCacheConfig(max_memory_mb=1.0)), "dit_cache.max_memory_mb"),
        (dataclasses.replace(config, scheduler=SchedulerConfig(priority_weights={"normal": 1.0})), "'low'"),
    ]
    for changed, words in refused:
        with pytest.raises(ConfigError, match=words):
            machine.update_config(changed)
        assert machine.get_config() is config


def test_without_stages_every_setting_may_change() -> None:
    machine = OmniScheduler(OmniConfig())
    machine.update_config(OmniConfig(max_memory_gb=1.0, request_timeout=2.0))
    machine.schedule(request())
    machine.tick(2.0)
    assert isinstance(machine.take_ends()[0].error, RequestTimeoutError)


def test_a_request_that_is_run_again_begins_from_its_first_stage_once_and_keeps_its_deadline() -> None:
    machine = scheduler(request_timeout=10.0)
    machine.schedule(request(), now=1.0)
    (first,) = machine.tick(1.0)
    finish(machine, first, 2.0)
    assert {task.stage for task in machine.tick(2.0)} == {"b", "c"}
    assert machine.run_again("r", 3.0) and not machine.run_again("nobody", 3.0)
    machine.check_integrity()
    assert machine.in_flight() == set()
    (again,) = machine.tick(3.0)
    assert again.stage == "a" and not machine.run_again("r", 4.0), "once"
    run = [again]
    while run:
        for task in run:
            finish(machine, task, 5.0)
        run = machine.tick(5.0)
    (end,) = machine.take_ends()
    assert end.status is RequestStatus.FINISHED and set(end.payloads) == {"a", "d"}
    machine.schedule(request("late"), now=20.0)
    machine.tick(20.0)
    assert machine.run_again("late", 29.0) and machine.tick(30.0) == []
    (end,) = machine.take_ends()
    assert isinstance(end.error, RequestTimeoutError)


def test_a_request_whose_text_comes_in_pieces_is_not_run_again_since_nobody_keeps_those_that_were_read() -> None:
    machine = scheduler()
    machine.schedule(dataclasses.replace(request(), prompt="", is_open=True), now=1.0)
    machine.tick(1.0)
    assert not machine.run_again("r", 2.0)
