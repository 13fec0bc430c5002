"""Several engines that share the tasks of a stage: who gets what, what a dead one leaves, restarting them in turn."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from support.loop import answer, request
from support.reaper import Reaper
from support.toy_engine import TextEngine, TextParams, TextSpecimen, text_config, toy_config, toy_stage
from support.toy_stream import StreamParams, register_streams, streamed

from vllm_omni import AsyncOmni, Omni
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import OmniConfig
from vllm_omni.engine.base import MemoryPlan
from vllm_omni.errors import ConfigError
from vllm_omni.executor.memory import plan_memory
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput


@pytest.fixture(autouse=True)
def released() -> Iterator[threading.Event]:
    TextEngine.released.clear()
    yield TextEngine.released
    TextEngine.released.set()


def replicated(num_replicas: int, config: OmniConfig | None = None, **options: Any) -> OmniConfig:
    """One stage that writes, of so many replicas."""
    stage = toy_stage("text", "toy_text", replicas=num_replicas, **options)
    return dataclasses.replace(config or text_config(), stages={"text": stage}, worker_timeout=5.0)


def run(loop: OmniExecutor, patience_s: float = 20.0) -> dict[str, OmniOutput]:
    """All final outputs."""
    found: dict[str, OmniOutput] = {}
    until = time.monotonic() + patience_s
    while loop.has_work():
        found |= {output.request_id: output for output in loop.step() if output.finished}
        loop.wait()
        assert time.monotonic() < until, loop.get_status()
    loop.check_integrity()
    return found


def replicas_of(loop: OmniExecutor | AsyncOmni | Omni, stage: str = "text") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = loop.get_status()["stages"][stage]["replicas"]
    return found


def until(condition: Any, loop: OmniExecutor, patience_s: float = 20.0) -> list[OmniOutput]:
    outputs: list[OmniOutput] = []
    end = time.monotonic() + patience_s
    while not condition():
        outputs += loop.step()
        loop.wait()
        assert time.monotonic() < end, loop.get_status()
    return outputs


def test_tasks_are_shared_out_by_their_size() -> None:
    loop = OmniExecutor(Pipeline(replicated(3)))
    for name, steps in (("large", 9), ("a", 3), ("b", 3), ("c", 3), ("d", 3)):
        loop.add_request(request(name, params=TextParams(steps=steps, do="block")))
    loop.step()
    assert [replica["outstanding"] for replica in replicas_of(loop)] == [9, 6, 6]
    assert [replica["tasks"] for replica in replicas_of(loop)] == [1, 2, 2]
    TextEngine.released.set()
    assert all(output.error is None for output in run(loop).values())
    assert [replica["outstanding"] for replica in replicas_of(loop)] == [0, 0, 0]
    stats = loop.get_metrics()["stages"]["text"]
    assert stats["steps"] == sum(replica["steps"] for replica in stats["replicas"]) >= 9
    loop.shutdown()


def test_what_a_dead_replica_leaves_goes_to_another_at_once() -> None:
    pipeline = Pipeline(replicated(2, step_s=0.002))
    reaper = Reaper(pipeline, SystemExit)
    loop = OmniExecutor(pipeline)
    reaper.begin({"text": {20}})
    begin = time.monotonic()
    for number in range(6):
        loop.add_request(request(str(number), str(number), params=TextParams(steps=20)), stream=True)
    outputs = run(loop)
    assert time.monotonic() - begin < 0.45, "nobody waits for the pause before the rebuild"
    retried = Counter(output.metrics["text"].get("retried", 0) for output in outputs.values())
    assert retried == {0: 3, 1: 3} and all(output.text == 20 * name for name, output in outputs.items())
    states = sorted(replica["state"] for replica in replicas_of(loop))
    assert states == ["ready", "rebuilding"] and loop.get_status()["stages"]["text"]["state"] == "ready"
    until(lambda: all(replica["state"] == "ready" for replica in replicas_of(loop)), loop)
    loop.shutdown()


def test_requests_are_refused_only_when_no_replica_is_left() -> None:
    loop = OmniExecutor(Pipeline(replicated(2)))
    poison = TextParams(do="exit")
    assert answer_in_time(loop, "poison", poison).error is not None
    assert all(replica["state"] == "rebuilding" for replica in replicas_of(loop)), "it is run again on the other"
    assert "is being rebuilt" in str(answer(loop, request("refused")).error)
    until(lambda: any(replica["alive"] for replica in replicas_of(loop)), loop)
    assert answer_in_time(loop, "next", TextParams()).error is None
    loop.shutdown()


def answer_in_time(loop: OmniExecutor, name: str, params: TextParams) -> OmniOutput:
    loop.add_request(request(name, "x", params=params))
    return run(loop)[name]


def test_rows_that_come_before_a_task_reach_the_replica_that_it_goes_to() -> None:
    edges = {
        "codes": streamed("talker.codes", first_chunk=2, chunk=2, left_context=1),
        "summary": "other.codes",
    }  # whole: it comes later
    register_streams()
    stages = {
        **{name: {"kind": "toy_writer"} for name in ("talker", "other")},
        "voice": {"kind": "toy_voice", "inputs": edges, "replicas": 3},
    }
    loop = OmniExecutor(Pipeline(load_config({"stages": stages, "outputs": ["voice.sound"]})))
    params = {"talker": StreamParams(rows=5), "other": StreamParams(rows=20, do="whole"), "voice": StreamParams()}
    for number in range(6):
        loop.add_request(request(str(number), params=params))
    outputs = run(loop)
    assert len(outputs) == 6
    for output in outputs.values():
        assert output.error is None and output.tensors["voice.sound"][:, 0].tolist() == [0, 10, 20, 30, 40]
    assert loop._stages["voice"].num_buffers == 0
    loop.shutdown()


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_rolling_restart_replaces_every_engine_and_loses_and_refuses_no_request(num_replicas: int) -> None:
    async def main() -> None:
        config = replicated(num_replicas, step_s=0.002, load_s=0.02)
        async with AsyncOmni(config) as omni:
            before = [host.executor for host in omni._executor._stages["text"].hosts]
            running = [asyncio.create_task(omni.generate(str(n % 10), TextParams(steps=30))) for n in range(9)]
            await asyncio.sleep(0.02)
            await omni.restart_stage("text")
            draining, late = set[int](), []
            while any(host.executor in before for host in omni._executor._stages["text"].hosts):
                states = [replica["state"] for replica in replicas_of(omni)]
                away = [number for number, state in enumerate(states) if state != "ready"]
                draining.add(len(away))
                late.append(asyncio.create_task(omni.generate("9", TextParams(steps=3))))
                await asyncio.sleep(0.01)
            outputs = [await task for task in [*running, *late]]
            assert all(output.error is None for output in outputs) and len(late) > 1
            assert all("retried" not in output.metrics["text"] for output in outputs)
            assert max(draining) == 1, "one after another"
            status = omni.get_status()["stages"]["text"]
            assert status["num_rebuilds"] == num_replicas
            with pytest.raises(ConfigError, match="did you mean 'text'"):
                await omni.restart_stage("txt")

    asyncio.run(asyncio.wait_for(main(), 30.0))


def test_omni_restarts_a_stage_between_two_calls() -> None:
    with Omni(text_config()) as omni:
        first = omni._executor._stages["text"].hosts[0].executor
        omni.restart_stage("text")
        (output,) = omni.generate("a")
        assert output.error is None and omni._executor._stages["text"].hosts[0].executor is not first
        assert omni.get_status()["stages"]["text"]["num_rebuilds"] == 1


def test_a_restart_that_cannot_load_stops_at_the_first_replica() -> None:
    pipeline = Pipeline(replicated(2))
    reaper = Reaper(pipeline)
    loop = OmniExecutor(pipeline)
    reaper.begin({}, loads={"text": {0}})
    loop.restart_stage("text")
    until(
        lambda: (
            loop.get_status()["stages"]["text"]["num_rebuilds"] == 1 and not loop._stages["text"].hosts[0].is_planned
        ),
        loop,
    )
    assert [replica["state"] for replica in replicas_of(loop)] == ["rebuilding", "ready"]
    assert "killed while it loads" in replicas_of(loop)[0]["cause"]
    assert answer_in_time(loop, "served", TextParams()).error is None
    until(lambda: not loop.is_mending, loop)
    assert reaper.num_loads["text"] == 3, "the second was restarted once the first was back"
    loop.shutdown()


def test_replicas_have_threads_and_take_devices_in_turn() -> None:
    loop = OmniExecutor(Pipeline(replicated(3, devices=("cpu", "meta"))))
    assert [str(device) for device in loop._builder.devices["text"]] == ["cpu", "meta", "cpu"]
    hosts = loop._stages["text"].hosts
    assert [type(host.executor).__name__ for host in hosts] == ["ThreadExecutor"] * 3
    loop.shutdown()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"replicas": 0}, "replicas: got 0, expected at least 1 and at most 1024"),
        ({"replicas": 2, "devices": ["cpu", "cpu", "cpu"]}, "devices: got 3, expected at most one for each"),
        ({"replicas": 2, "devices": ["cpu", "cpu 1"]}, "stages.text.devices: got 'cpu 1'"),
        ({"replicas": 2, "devices": ["cpu"], "device": "cpu"}, "stages.text.device: stands beside `devices`"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, Any], words: str) -> None:
    toy_config()
    with pytest.raises(ConfigError, match=words):
        load_config({"stages": {"text": {"kind": "toy_text", **keys}}, "outputs": ["text"]})


def test_the_memory_of_replicas_counts_each_time_but_weights_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(spec: Any) -> MemoryPlan:
        return MemoryPlan(weights_bytes=1000, kv_pool_bytes=10)

    monkeypatch.setattr(TextSpecimen, "plan_memory", plan)
    together = plan_memory(Pipeline(replicated(3)))["text"]
    apart = plan_memory(Pipeline(replicated(3, devices=("cpu", "meta"))))["text"]
    assert (together.weights_bytes, together.kv_pool_bytes, together.total_bytes) == (1000, 30, 1030)
    assert (apart.weights_bytes, apart.kv_pool_bytes) == (2000, 30)


def test_a_stage_that_waits_for_its_device_holds_no_other_up() -> None:
    """Two stages on two devices: while one is inside a step, the other finishes all its work."""
    stages = {
        "text_a": dataclasses.replace(toy_stage("text_a", "toy_text"), device="meta"),
        "text_b": toy_stage("text_b", "toy_text"),
    }
    loop = OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text_a", "text_b"), worker_timeout=30.0)))
    slow = {"text_a": TextParams(do="block"), "text_b": TextParams(steps=50)}
    loop.add_request(request("slow", params=slow))
    loop.add_request(request("quick", "q", params={"text_b": TextParams(steps=20)}, outputs=("text_b",)))
    begin = time.monotonic()
    outputs = until(lambda: loop.find("slow").done == ("text_b",) and loop.find("quick") is None, loop)  # type: ignore[union-attr]
    assert [output.text for output in outputs] == ["q" * 20] and time.monotonic() - begin < 5.0
    assert loop.get_status()["stages"]["text_a"]["tasks"] == 1
    TextEngine.released.set()
    assert run(loop)["slow"].error is None
    loop.shutdown()
