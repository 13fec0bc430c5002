"""Streamed edges in the scheduler alone: with conditions, with whole inputs, in a ring of waiting, and broken books."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.scheduler import request

from vllm_omni.config.graph import CALLER, Edge, StageGraph
from vllm_omni.config.schema import EdgeConfig, OmniConfig, StageConfig, StreamConfig
from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.core.routing.request_plan import default_plan
from vllm_omni.errors import RequestTimeoutError, SchedulerError
from vllm_omni.messages import Feed, StageTask
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec
from vllm_omni.request import RequestStatus

SPEC = TensorSpec(("T",))
Inputs = Mapping[str, "str | EdgeConfig"]


def streamed(source: str, **keys: Any) -> EdgeConfig:
    return EdgeConfig(source, stream=StreamConfig(**keys))


class Run:
    """One request through stages that are done by hand; they read x and y, x being required, and give `out`."""

    def __init__(self, outputs: tuple[str, ...], **inputs: Inputs) -> None:
        ports = {"x": SPEC, "y": SPEC}
        signature = StageSignature(
            ports,
            {"out": SPEC},
            frozenset({"x"}),
            frozenset({"out"}),
            streamed_inputs=frozenset(ports),
            streamed_outputs=frozenset({"out"}),
        )
        writer = StageSignature({}, {"out": SPEC}, results=frozenset({"out"}), streamed_outputs=frozenset({"out"}))
        stages = {name: StageConfig(name=name, kind="toy", inputs=given) for name, given in inputs.items()}
        signatures = {name: signature if given else writer for name, given in inputs.items()}
        self.machine = OmniScheduler(OmniConfig(), StageGraph(stages, signatures, outputs))
        self.machine.schedule(request())
        self.inputs: dict[str, Mapping[str, Any]] = {}
        self.gave_rows: set[str] = set()

    def tick(self, now: float = 0.0) -> list[str]:
        """What is ordered, in short."""
        words = []
        for order in self.machine.tick(now):
            if isinstance(order, StageTask):
                self.inputs[order.stage] = order.inputs
                words.append(f"launch {order.stage}")
            elif isinstance(order, Feed):
                words.append(f"feed {order.stage}.{order.port} {order.rows.start}-{order.rows.stop}")
            else:
                words.append(f"{type(order).__name__.lower()} {order.stage}")
        self.machine.check_integrity()
        return words

    def rows(self, stage: str, num_rows: int = 1, is_last: bool = False) -> list[str]:
        """The readers that are to keep them."""
        self.gave_rows.add(stage)
        edges = self.machine.rows_made("r", stage, "out", num_rows, is_last, 0.0)
        self.machine.check_integrity()
        return [edge.target for edge in edges]

    def hold_back(self, busy: set[str], **devices: str) -> frozenset[str]:
        """On one device, but for those that are named."""
        given = {**dict.fromkeys("abc", "cpu"), **devices}
        return self.machine.hold_back(busy, {name: device.split("+") for name, device in given.items()})

    def consumed(self, stage: str, port: str, now: float = 0.0) -> None:
        self.machine.chunk_consumed("r", stage, port, now)

    def done(self, stage: str, **meta: Any) -> None:
        """What a stage gave no rows of comes from its payload, as its host has it."""
        if stage not in self.gave_rows:
            self.rows(stage, 2, is_last=True)
        payload = StagePayload("r", stage, {"out": torch.ones(2)}, meta)
        self.machine.stage_done("r", stage, payload, {}, 0.0)
        self.machine.check_integrity()


def test_a_reader_waits_for_the_first_chunk_of_every_streamed_and_for_the_whole_of_every_other_input() -> None:
    run = Run(("c",), a={}, b={}, c={"x": streamed("a.out", first_chunk=2), "y": "b.out"})
    assert run.tick() == ["launch a", "launch b"]
    run.rows("a")
    run.done("b")
    assert run.tick() == []
    run.rows("a")
    run.rows("a")
    assert run.tick() == ["launch c", "feed c.x 2-3"]
    first, whole = run.inputs["c"]["x"], run.inputs["c"]["y"]
    assert (first.start, first.stop, first.is_last) == (0, 2, False) and (whole.stop, whole.is_last) == (2, True)


def test_a_reader_that_starts_after_its_writer_is_done_is_given_chunk_after_chunk() -> None:
    run = Run(("c",), a={}, b={}, c={"x": streamed("a.out"), "y": "b.out"})
    run.tick()
    for _ in range(3):
        run.rows("a")
    run.done("a")
    assert run.tick() == []
    run.done("b")
    assert run.tick() == ["launch c", "feed c.x 1-2", "feed c.x 2-3"]


def test_while_a_busy_stage_is_on_its_first_chunk_all_before_it_are_held_back() -> None:
    run = Run(("c",), a={}, b={"x": streamed("a.out")}, c={"x": streamed("b.out")})
    stages = {"a", "b", "c"}
    run.tick()
    assert run.hold_back(stages) == set()
    run.rows("a")
    run.tick()
    assert run.hold_back(stages) == {"a"}, "b has its first chunk"
    assert run.hold_back({"a", "c"}) == set(), "b has nothing to do, so nobody waits for it"
    run.consumed("b", "x")
    assert run.hold_back(stages) == set()
    run.rows("b")
    run.tick()
    assert run.hold_back(stages) == {"a", "b"}
    run.consumed("c", "x")
    assert run.hold_back(stages) == set()


def test_stages_on_other_devices_are_not_held_back() -> None:
    run = Run(("c",), a={}, b={"x": streamed("a.out")}, c={"x": streamed("b.out")})
    run.tick()
    run.rows("a")
    run.tick()
    assert run.hold_back({"a", "b"}) == {"a"}
    assert run.hold_back({"a", "b"}, a="cuda:1") == set()
    assert run.hold_back({"a", "b"}, a="cuda:1+cpu") == {"a"}, "one of its replicas is beside that of the other"


def test_time_does_not_count_for_a_reader_whose_writer_is_held_back() -> None:
    run = Run(("c",), a={}, b={"x": streamed("a.out", chunk_timeout_s=10)}, c={"x": streamed("b.out")})
    run.tick()
    run.rows("a")
    run.tick()
    run.consumed("b", "x")
    run.rows("b")
    run.tick()
    run.hold_back({"b", "c"})
    run.tick(now=100.0)
    assert not run.machine.take_ends()
    run.consumed("c", "x")
    run.hold_back({"b", "c"})
    run.tick(now=109.0)
    assert not run.machine.take_ends()
    run.tick(now=110.0)
    (end,) = run.machine.take_ends()
    assert isinstance(end.error, RequestTimeoutError) and "a.out -> b.x" in str(end.error)


def test_a_reader_that_has_not_started_holds_no_writer_back_until_it_does() -> None:
    run = Run(("c",), a={}, b={}, c={"x": streamed("a.out", max_ahead=2), "y": "b.out"})
    run.tick()
    for _ in range(5):
        run.rows("a")
    assert run.tick() == []
    run.done("b")
    assert run.tick() == ["launch c", *(f"feed c.x {i}-{i + 1}" for i in range(1, 5)), "pause a"]
    for _ in range(4):
        run.consumed("c", "x")
    assert run.tick() == ["resume a"]


def test_a_writer_that_ends_in_spite_of_a_pause_is_not_resumed() -> None:
    run = Run(("b",), a={}, b={"x": streamed("a.out", max_ahead=2)})
    assert run.tick() == ["launch a"]
    run.rows("a")
    run.rows("a")
    assert run.tick() == ["launch b", "feed b.x 1-2", "pause a"]
    run.done("a")
    assert run.tick() == ["feed b.x 2-2"]


def test_rows_for_a_reader_that_is_skipped_are_let_go() -> None:
    run = Run(("a", "c"), a={}, b={}, c={"y": streamed("a.out"), "x": EdgeConfig("b.out", "n")})
    run.tick()
    assert run.rows("a") == ["c"]
    run.done("b")
    assert run.tick() == ["skip c"]
    assert run.rows("a") == [] and run.tick() == []
    run.done("a")
    (end,) = run.machine.take_ends()
    assert end.status is RequestStatus.FINISHED and end.metrics["c"]["skipped"] is True


@pytest.mark.parametrize(("port", "is_skipped"), [("x", True), ("y", False)])
def test_a_stream_whose_writer_is_skipped_is_lost(port: str, is_skipped: bool) -> None:
    inputs: dict[str, Any] = {"x": "a.out"} | {port: streamed("b.out")}
    run = Run(("a", "c"), a={}, b={"x": EdgeConfig("a.out", "n")}, c=inputs)
    run.tick()
    run.done("a")
    assert run.tick() == ([] if is_skipped else ["launch c"])
    if not is_skipped:
        assert set(run.inputs["c"]) == {"x"}


def test_a_ring_of_waiting_ends_with_what_to_change() -> None:
    """a feeds b and c, b feeds c; c wants b's rows before it takes a's, and a is paused for c before b has enough."""
    waits = {"chunk_timeout_s": 5.0}
    run = Run(
        ("c",),
        a={},
        b={"x": streamed("a.out", first_chunk=2, chunk=2, **waits)},
        c={"x": streamed("b.out", **waits), "y": streamed("a.out", max_ahead=2, **waits)},
    )
    run.tick()
    for _ in range(2):
        run.rows("a")
    assert run.tick() == ["launch b"]
    run.consumed("b", "x")
    run.rows("b")
    assert run.tick() == ["launch c", "feed c.y 1-2", "pause a"]
    run.consumed("c", "x")
    run.tick(4.9)
    assert run.machine.has_work and not run.machine.take_ends()
    run.tick(5.0)
    (end,) = run.machine.take_ends()
    assert isinstance(end.error, RequestTimeoutError) and set(end.abandoned) == {"a", "b", "c"}
    assert str(end.error) == (
        "a.out -> b.x: no chunk came for 5 s; 'a' is paused for a reader that waits too; raise max_ahead of the edges "
        "from it"
    )


def test_what_comes_too_late_for_a_stream_is_dropped_and_counted() -> None:
    run = Run(("b",), a={}, b={"x": streamed("a.out")})
    run.tick()
    run.machine.abort("r")
    run.rows("a")
    run.consumed("b", "x")
    assert run.machine.get_metrics()["stray_events"] == 2
    assert [end.status for end in run.machine.take_ends()] == [RequestStatus.ABORTED]


def test_counts_of_streams_that_disagree_are_found() -> None:
    run = Run(("b",), a={}, b={"x": streamed("a.out")})
    run.tick()
    run.rows("a")
    run.tick()
    streams = run.machine._requests.running["r"].streams
    (stream,) = streams._streams.values()
    streams.paused.add("b2")
    with pytest.raises(SchedulerError, match=r"'b2'.* are paused, but only"):
        run.machine.check_integrity()
    streams.paused.clear()
    stream._num_consumed += 1
    with pytest.raises(SchedulerError, match="1 handed over, 1 consumed"):
        run.machine.check_integrity()


def test_time_counts_for_no_stage_while_the_caller_is_waited_for() -> None:
    """a reads what the caller writes and feeds b; a chunk from the caller is whatever has come."""
    run = Run(("b",), a={}, b={"x": streamed("a.out", chunk_timeout_s=5.0)})
    text = Edge(CALLER, "text", "a", "text", stream=StreamConfig(max_ahead=1), takes_chunks=True)
    plan = default_plan(run.machine._graph)
    stages = {**plan.stages, "a": dataclasses.replace(plan.stages["a"], edges=(text,))}
    run.machine.schedule(request("open", timeout_s=100.0), dataclasses.replace(plan, stages=stages))
    run.machine.abort("r")
    assert run.tick(50.0) == [], "it waits for its first words, and is not stalled"

    def write(num_rows: int, is_last: bool = False) -> bool:
        return run.machine.text_came("open", text, num_rows, is_last, 50.0)

    assert write(3) and run.tick(50.0) == ["launch a"] and run.inputs["a"]["text"].stop == 3
    run.machine.rows_made("open", "a", "out", 1, False, 50.0)
    assert run.tick(50.0) == ["launch b"]
    assert run.machine.is_waiting("open", "a")
    for stage, port in (("a", "text"), ("b", "x")):
        run.machine.chunk_consumed("open", stage, port, 50.0)
    assert run.tick(60.0) == []
    assert write(2) and write(5) and run.tick(60.0) == ["feed a.text 3-10"]
    assert run.tick(64.0) == [], "from 60 s on the writer is a"
    assert write(0, is_last=True) and run.tick(64.5) == ["feed a.text 10-10"]
    assert not run.machine.is_waiting("open", "a")
    assert not write(1), "a piece after the last ends it"
    assert not write(1) and run.tick(66.0) == []
    assert "rows of 'text' after the last" in str(run.machine.take_ends()[-1].error)


def test_a_caller_who_writes_nothing_is_waited_for_until_the_deadline() -> None:
    run = Run(("b",), a={}, b={"x": streamed("a.out")})
    text = Edge(CALLER, "text", "a", "text", stream=StreamConfig(), takes_chunks=True)
    plan = default_plan(run.machine._graph)
    stages = {**plan.stages, "a": dataclasses.replace(plan.stages["a"], edges=(text,))}
    run.machine.schedule(request("open", timeout_s=100.0), dataclasses.replace(plan, stages=stages))
    run.machine.abort("r")
    assert run.tick(99.0) == [] and run.machine.is_unfinished("open")
    assert run.tick(100.0) == [] and not run.machine.text_came("open", text, 1, False, 100.0)
    assert isinstance(run.machine.take_ends()[-1].error, RequestTimeoutError)
