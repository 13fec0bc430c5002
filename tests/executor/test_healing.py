"""A stage that breaks is rebuilt: its tasks fail with the cause, nobody else notices, and then it works again."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from support.loop import Clock, answer, engine, finish, request
from support.toy_engine import PictureParams, TextParams, text_config, toy_config, toy_stage

from vllm_omni import AsyncOmni, Omni, RequestStatus
from vllm_omni.config.schema import OmniConfig
from vllm_omni.errors import ResourceError, StageError, StageUnavailableError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.recovery import FIRST_PAUSE_S, LONGEST_PAUSE_S, Recovery
from vllm_omni.request import OmniOutput

RAISE = TextParams(do="raise")


def two_branches() -> OmniConfig:
    stages = {name: toy_stage(name, "toy_text") for name in ("text_a", "text_b")}
    return toy_config(stages=stages, outputs=("text_a", "text_b"))


def loop_of(config: OmniConfig) -> tuple[OmniExecutor, Clock]:
    clock = Clock()
    return OmniExecutor(Pipeline(config), clock=clock), clock


def break_stage(loop: OmniExecutor, stage: str = "encode") -> OmniOutput:
    """Two raises in a row; the last answer."""
    for name in ("one", "two"):
        output = answer(loop, request(name, params={stage: RAISE, "picture": PictureParams(guided=True)}))
        assert output.status is RequestStatus.FAILED and isinstance(output.error, StageError)
        assert isinstance(output.error.__cause__, RuntimeError) and "boom" in str(output.error)
    return output


def status_of(loop: OmniExecutor, stage: str = "encode") -> dict[str, Any]:
    """Of its one replica."""
    found: dict[str, Any] = loop.get_status()["stages"][stage]
    (replica,) = found["replicas"]
    assert all(found[key] == replica[key] for key in ("alive", "state", "silent_s", "num_rebuilds", "cause"))
    return replica


def test_a_stage_that_raises_twice_in_a_row_refuses_until_it_is_rebuilt_and_then_works() -> None:
    loop, clock = loop_of(toy_config())
    before = engine(loop, "encode")
    break_stage(loop)
    refused = answer(loop, request("three"))
    assert refused.status is RequestStatus.REJECTED and isinstance(refused.error, StageUnavailableError)
    assert "'encode' is being rebuilt" in str(refused.error) and "boom" in str(refused.error)
    assert isinstance(refused.error.__cause__, RuntimeError) and refused.error.retry_after_s == FIRST_PAUSE_S
    assert status_of(loop) == {"tasks": 0, "alive": False, "state": "rebuilding", "silent_s": 0.0, "num_rebuilds": 0,
                               "cause": "RuntimeError: boom", "outstanding": 0.0}  # fmt: skip
    clock.now += refused.error.retry_after_s
    assert answer(loop, request("four")).error is None
    assert engine(loop, "encode") is not before
    assert status_of(loop) == {"tasks": 0, "alive": True, "state": "ready", "silent_s": 0.0, "num_rebuilds": 1,
                               "cause": None, "outstanding": 0.0}  # fmt: skip


def test_requests_of_other_stages_go_on_meanwhile() -> None:
    loop, clock = loop_of(toy_config())
    break_stage(loop, "guide")
    assert answer(loop, request("plain")).error is None
    guided = answer(loop, request("guided", params=PictureParams(guided=True)))
    assert guided.status is RequestStatus.REJECTED and "'guide' is being rebuilt" in str(guided.error)
    clock.now += FIRST_PAUSE_S
    assert answer(loop, request("again", params=PictureParams(guided=True))).error is None


def test_pauses_grow_until_a_task_has_finished() -> None:
    loop, clock = loop_of(toy_config())
    waits: list[float] = []
    for _ in range(4):
        break_stage(loop)
        refused = answer(loop, request("refused")).error
        assert isinstance(refused, StageUnavailableError)
        waits.append(refused.retry_after_s)
        clock.now += refused.retry_after_s
    assert waits == [FIRST_PAUSE_S * 2**n for n in range(4)]
    assert answer(loop, request("good")).error is None
    break_stage(loop)
    refused = answer(loop, request("refused")).error
    assert isinstance(refused, StageUnavailableError) and refused.retry_after_s == FIRST_PAUSE_S
    assert status_of(loop)["num_rebuilds"] == 4


def test_the_pause_has_a_limit() -> None:
    recovery, now = Recovery(), 0.0
    for _ in range(20):
        recovery.begin(RuntimeError("boom"), now)
        assert not recovery.is_due(now)
        now += LONGEST_PAUSE_S
        assert recovery.is_due(now)
        recovery.load(now)
        assert not recovery.is_due(now)
        now += 7.0
        recovery.end(now)
    assert recovery.num_rebuilds == 20
    recovery.begin(RuntimeError("boom"), now)
    assert recovery.retry_after_s(now) == LONGEST_PAUSE_S + 7.0, "loading takes its time too"


def test_a_rebuild_that_fails_is_tried_again_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, clock = loop_of(toy_config())
    break_stage(loop)
    spec, good = loop._pipeline.specs["encode"], type(loop._pipeline.specs["encode"]).load

    def burning(*_: Any) -> Any:
        raise RuntimeError("weights are on fire")

    monkeypatch.setattr(type(spec), "load", burning)
    clock.now += FIRST_PAUSE_S
    refused = answer(loop, request("three"))
    assert refused.status is RequestStatus.REJECTED and "weights are on fire" in str(refused.error)
    assert status_of(loop)["num_rebuilds"] == 1 and status_of(loop)["state"] == "rebuilding"
    monkeypatch.setattr(type(spec), "load", good)
    assert answer(loop, request("too early")).status is RequestStatus.REJECTED
    clock.now += 2 * FIRST_PAUSE_S
    assert answer(loop, request("four")).error is None
    assert status_of(loop)["num_rebuilds"] == 2


def test_a_rebuild_takes_the_loaded_weights_and_frees_what_the_engine_held() -> None:
    loop, clock = loop_of(toy_config())
    loads: list[int] = []
    loop._builder.models.get("weights", lambda: loads.append(1))
    break_stage(loop)
    host = loop._stages["encode"].hosts[0]
    assert host.executor._engine is None, "the broken engine is let go before a new one is made"  # type: ignore[attr-defined]
    clock.now += FIRST_PAUSE_S
    answer(loop, request("next"))
    loop._builder.models.get("weights", lambda: loads.append(1))
    assert loads == [1]


def test_an_engine_that_cannot_drop_a_task_is_rebuilt_and_runs_the_others_again() -> None:
    loop, clock = loop_of(toy_config())
    for name in ("a", "b"):
        loop.add_request(request(name, params={"encode": TextParams(steps=50)}))
    loop.step()

    def stuck(request_id: str) -> None:
        raise LookupError("which one?")

    engine(loop, "encode").abort = stuck
    loop.abort("a")
    assert [output.status for output in loop.take_outputs()] == [RequestStatus.ABORTED]
    loop.step()
    assert "which one?" in status_of(loop)["cause"]
    clock.now += FIRST_PAUSE_S
    outputs = finish(loop)
    assert outputs["b"].error is None and outputs["b"].metrics["encode"]["retried"] == 1
    assert answer(loop, request("c")).error is None


def test_a_stage_that_is_silent_twice_in_a_row_is_rebuilt() -> None:
    loop, clock = loop_of(toy_config(worker_timeout=10.0))
    for name in ("one", "two"):
        loop.add_request(request(name, params={"encode": TextParams(do="hang")}))
        loop.step()
        clock.now += 10.0
        (output,) = loop.step()
        assert "no progress for 10.0 s" in str(output.error)
    assert status_of(loop)["state"] == "rebuilding"
    clock.now += FIRST_PAUSE_S
    assert answer(loop, request("three")).error is None


@pytest.mark.parametrize("do", ["no_memory", "no_host_memory"])
def test_a_step_out_of_memory_says_so_and_the_stage_goes_on(do: str) -> None:
    loop, _ = loop_of(toy_config())
    for turn in range(3):
        output = answer(loop, request(f"large{turn}", params={"encode": TextParams(do=do)}))
        assert output.status is RequestStatus.FAILED and isinstance(output.error, StageError)
        assert "out of memory" in str(output.error) and isinstance(output.error.__cause__, ResourceError)
        assert answer(loop, request(f"small{turn}", str(turn))).error is None
    assert status_of(loop)["num_rebuilds"] == 0


def test_a_stage_that_stays_without_memory_releases_it_before_it_is_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, clock = loop_of(toy_config())
    released: list[bool] = []
    for name in ("one", "two"):
        answer(loop, request(name, params={"encode": TextParams(do="no_memory")}))
    host = loop._stages["encode"].hosts[0]
    monkeypatch.setattr("vllm_omni.executor.stage_host.release_memory", lambda: released.append(not host.is_ready))
    clock.now += FIRST_PAUSE_S
    assert answer(loop, request("three")).error is None and released == [True]


def test_omni_is_whole_again_after_the_pause_though_nobody_stepped_it_meanwhile() -> None:
    with Omni(toy_config()) as omni:
        omni.generate(["a", "b"], {"encode": RAISE})
        omni.generate("c", {"encode": RAISE})
        (refused,) = omni.generate("d")
        assert isinstance(refused.error, StageUnavailableError)
        time.sleep(refused.error.retry_after_s + 0.05)
        (output,) = omni.generate("d")
        assert output.error is None and len(output.images) == 1


def test_async_omni_rebuilds_by_itself_and_says_when_it_is_ready() -> None:
    async def main() -> None:
        async with AsyncOmni(two_branches()) as omni:
            for _ in range(2):
                assert (await omni.generate("a", {"text_a": RAISE})).error is not None
            status = omni.get_status()["stages"]
            assert status["text_a"]["state"] == "rebuilding" and status["text_b"]["state"] == "ready"
            while omni.get_status()["stages"]["text_a"]["state"] != "ready":
                await asyncio.sleep(0.02)
            assert (await omni.generate("a")).error is None

    asyncio.run(asyncio.wait_for(main(), 20.0))


def test_a_loop_that_is_inside_one_step_says_since_when_from_another_thread() -> None:
    config = text_config(worker_timeout=0.1)
    loop = OmniExecutor(Pipeline(config))
    entered, leave = threading.Event(), threading.Event()
    step = engine(loop, "text").step

    def slow() -> Any:
        entered.set()
        leave.wait(20.0)
        return step()

    engine(loop, "text").step = slow
    assert loop.step_started is None and loop.get_status()["step_s"] == 0.0
    loop.add_request(request("r", "x"))
    thread = threading.Thread(target=lambda: finish(loop))
    thread.start()
    assert entered.wait(20.0)
    time.sleep(0.2)
    status = loop.get_status()
    assert loop.step_started is not None and status["step_s"] >= 0.2
    assert status["stages"]["text"]["state"] == "stuck" and not status["stages"]["text"]["alive"]
    assert status["stages"]["text"]["silent_s"] >= 0.2 and "no answer for" in status["stages"]["text"]["cause"]
    leave.set()
    thread.join(20.0)
    assert loop.step_started is None and loop.get_status()["stages"]["text"]["state"] == "ready"


def test_a_request_that_reaches_a_stage_while_it_is_rebuilt_waits_for_that() -> None:
    loop, clock = loop_of(toy_config())

    def broken() -> Any:
        raise RuntimeError("boom")

    engine(loop, "picture").step = broken
    for name, steps in (("one", 1), ("two", 9), ("late", 30)):
        loop.add_request(request(name, params={"encode": TextParams(steps=steps), "picture": PictureParams()}))
    outputs = [output for _ in range(60) for output in loop.step()]
    assert [(output.request_id, type(output.error)) for output in outputs] == [("one", StageError), ("two", StageError)]
    status = loop.get_status()["stages"]["picture"]
    assert (status["state"], status["tasks"], status["waiting"]) == ("rebuilding", 1, 1)
    clock.now += FIRST_PAUSE_S
    late = finish(loop)["late"]
    assert late.error is None and "retried" not in late.metrics["picture"]


def test_requests_that_wait_for_a_rebuild_end_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, clock = loop_of(toy_config())

    def broken() -> Any:
        raise SystemError("boom")

    engine(loop, "picture").step = broken
    for name, steps in (("one", 1), ("two", 9), ("late", 30)):
        loop.add_request(request(name, params={"encode": TextParams(steps=steps), "picture": PictureParams()}))
    for _ in range(60):
        loop.step()
    monkeypatch.setattr(type(loop._pipeline.specs["picture"]), "load", broken)
    clock.now += FIRST_PAUSE_S
    late = finish(loop)["late"].error
    assert isinstance(late, StageUnavailableError) and late.retry_after_s == 2 * FIRST_PAUSE_S
