"""Random graphs, conditions, streams and payloads against a model that works out from scratch who must be skipped, who
is given which chunks, and who is held back.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.scheduler import request

from vllm_omni.config.graph import StageGraph
from vllm_omni.config.schema import EdgeConfig, OmniConfig, StageConfig, StreamConfig
from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.errors import StageError
from vllm_omni.messages import Feed, Order, Pause, Resume, StageTask
from vllm_omni.payload import RowRange, StagePayload, StageSignature, TensorSpec
from vllm_omni.request import RequestStatus

SPEC = TensorSpec(("T",))
CONDITIONS = {"": lambda meta: True, "x": lambda meta: meta.get("x"), "not x": lambda meta: not meta.get("x")}
CONDITIONS |= {"x and y": lambda meta: meta.get("x") and meta.get("y"), "y == 2": lambda meta: meta.get("y") == 2}


class Value:
    """What a port gives; not a tensor, so that a test can watch it go."""


@dataclass
class Source:
    """How a stage reads another: under a condition (''), or row by row, and whether it must."""

    when: str = ""
    is_required: bool = False
    stream: StreamConfig | None = None

    def edge(self, source: str) -> EdgeConfig:
        return EdgeConfig(f"{source}.rows" if self.stream else f"{source}.out", self.when or None, self.stream)


@dataclass
class Case:
    """Stages by name -> their sources; what each stage's payload will say."""

    edges: dict[str, dict[str, Source]]
    outputs: list[str]
    metas: list[dict[str, dict[str, int]]] = field(default_factory=list)

    def graph(self) -> StageGraph:
        stages, signatures = {}, {}
        for name, sources in self.edges.items():
            inputs = {source: how.edge(source) for source, how in sources.items()}
            stages[name] = StageConfig(name=name, kind="toy", inputs=inputs)
            signatures[name] = StageSignature(
                dict.fromkeys(sources, SPEC),
                {"out": SPEC, "rows": SPEC},
                frozenset(source for source, how in sources.items() if how.is_required),
                frozenset({"out"}),
                streamed_inputs=frozenset(source for source, how in sources.items() if how.stream),
                streamed_outputs=frozenset({"rows"}),
            )
        return StageGraph(stages, signatures, self.outputs)


@st.composite
def sources(draw: st.DrawFn) -> Source:
    is_required = draw(st.booleans())
    if draw(st.booleans()):
        return Source(draw(st.sampled_from(sorted(CONDITIONS))), is_required)
    first, chunk, ahead = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    most = max(first, chunk) + ahead + draw(st.integers(0, 2))
    return Source("", is_required, StreamConfig(first, chunk, draw(st.integers(0, 2)), ahead, most))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    edges: dict[str, dict[str, Source]] = {}
    for index in range(draw(st.integers(2, 7))):
        found = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        edges[f"s{index}"] = {f"s{source}": draw(sources()) for source in sorted(found)}
    read = {source for found in edges.values() for source in found}
    listed = draw(st.sets(st.sampled_from(sorted(edges)), max_size=2))
    metas = st.fixed_dictionaries({}, optional={"x": st.integers(0, 1), "y": st.integers(1, 2)})
    by_stage = st.fixed_dictionaries(dict.fromkeys(edges, metas))
    return Case(edges, [name for name in edges if name not in read or name in listed], [draw(by_stage), draw(by_stage)])


Span = tuple[int, int, int, int, bool]


def span(rows: RowRange) -> Span:
    return (rows.start, rows.stop, rows.num_before, rows.num_after, rows.is_last)


def cut(num_rows: int, is_ended: bool, stream: StreamConfig, given: Sequence[Span] = ()) -> list[Span]:
    """The chunks so far (start, stop, context before and after, whether it is the last): those that were given before,
    and what can be made of the rows there are now.
    """
    spans = list(given)
    while not spans or not spans[-1][-1]:
        start = spans[-1][1] if spans else 0
        stop = start + (stream.chunk if spans else stream.first_chunk)
        if not is_ended and stop + stream.look_ahead > num_rows:
            break
        stop = min(stop, num_rows)
        after = min(stream.look_ahead, num_rows - stop)
        spans.append((start, stop, min(stream.left_context, start), after, is_ended and stop == num_rows))
    return spans


class Model:
    """What must be true of one request, given which of its stages have started and which are done, the rows they wrote,
    which of them said that they were the last, and over each edge (reader, source) what was given and how much taken.
    """

    def __init__(self, case: Case, meta: dict[str, dict[str, int]]) -> None:
        self.case = case
        self.meta = meta
        self.started: set[str] = set()
        self.done: set[str] = set()
        self.rows: dict[str, int] = dict.fromkeys(case.edges, 0)
        self.ended: set[str] = set()
        self.given: dict[tuple[str, str], list[Span]] = {}
        self.taken: dict[tuple[str, str], int] = {}

    def is_lost(self, stage: str, source: str, skipped: set[str]) -> bool:
        text = self.case.edges[stage][source].when
        return source in skipped or (source in self.done and not CONDITIONS[text](self.meta[source]))

    def is_there(self, stage: str, source: str) -> bool:
        """Whether an input that is not lost is."""
        stream = self.case.edges[stage][source].stream
        if stream is None:
            return source in self.done
        return bool(self.rows[source]) and bool(cut(self.rows[source], source in self.ended, stream))

    def streams(self) -> list[tuple[str, str, StreamConfig]]:
        """(reader, source, how), where the reader runs and could start with it."""
        return [
            (stage, source, how.stream)
            for stage in self.started - self.done
            for source, how in self.case.edges[stage].items()
            if how.stream and (stage, source) in self.given
        ]

    def paused(self) -> set[str]:
        full = set()
        for stage, source, stream in self.streams():
            used = self.given[stage, source][: self.taken[stage, source]]
            num_ahead = self.rows[source] - (used[-1][1] if used else 0)
            if source not in self.ended and num_ahead >= stream.max_ahead:
                full.add(source)
        return full

    def skipped(self) -> set[str]:
        """The least set that is closed under both rules."""
        found: set[str] = set()
        while True:
            more = {
                stage for stage in self.case.edges if stage not in found | self.started and self.skips(stage, found)
            }
            if not more:
                return found
            found |= more

    def skips(self, stage: str, skipped: set[str]) -> bool:
        sources = self.case.edges[stage]
        if any(how.is_required and self.is_lost(stage, source, skipped) for source, how in sources.items()):
            return True
        readers = {other for other, read in self.case.edges.items() if stage in read}
        return stage not in self.case.outputs and bool(readers) and readers <= skipped

    def ready(self) -> dict[str, set[str]]:
        """Stages that must launch now -> the inputs they get."""
        skipped = self.skipped()
        return {
            stage: {source for source in sources if not self.is_lost(stage, source, skipped)}
            for stage, sources in self.case.edges.items()
            if stage not in skipped | self.started
            and all(source in skipped or self.is_there(stage, source) for source in sources)
        }


class Play:
    """A scheduler with one request per meta, and their models."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.machine = OmniScheduler(OmniConfig(), case.graph())
        self.models = {f"r{index}": Model(case, meta) for index, meta in enumerate(case.metas)}
        self.in_flight: list[StageTask] = []
        self.paused: set[tuple[str, str]] = set()
        self.values: list[weakref.ref[Any]] = []
        self.ended: dict[str, Any] = {}
        for name in self.models:
            self.machine.schedule(request(name))

    def tick(self) -> None:
        expected = {(name, stage): ports for name, model in self.alive() for stage, ports in model.ready().items()}
        before = {name: dict(model.given) for name, model in self.alive()}
        orders = self.machine.tick(0.0)
        launches = [order for order in orders if isinstance(order, StageTask)]
        assert {(launch.request.request_id, launch.stage): set(launch.inputs) for launch in launches} == expected
        for order in orders:
            self.take(order)
        self.in_flight += launches
        self.check()
        for name, model in self.alive():
            assert {stage for request_id, stage in self.paused if request_id == name} == model.paused()
            for stage, source, stream in model.streams():
                chunks = before[name].get((stage, source), [])
                expected_chunks = cut(model.rows[source], source in model.ended, stream, chunks)
                assert model.given[stage, source] == expected_chunks

    def take(self, order: Order) -> None:
        if isinstance(order, StageTask):
            name = order.request.request_id
            model = self.models[name]
            model.started.add(order.stage)
            for source, value in order.inputs.items():
                if isinstance(value, RowRange):
                    model.taken[order.stage, source] = 0
                    self.give(model, order.stage, source, value)
        elif isinstance(order, Feed):
            self.give(self.models[order.request_id], order.stage, order.port, order.rows)
        elif isinstance(order, Pause):
            assert (order.request_id, order.stage) not in self.paused
            self.paused.add((order.request_id, order.stage))
        elif isinstance(order, Resume):
            self.paused.remove((order.request_id, order.stage))

    def give(self, model: Model, stage: str, source: str, rows: RowRange) -> None:
        model.given[stage, source] = [*model.given.get((stage, source), []), span(rows)]
        assert rows.keep_from <= rows.stop or rows.is_last

    def write(self, index: int, num_rows: int, is_last: bool) -> None:
        """A stage at work gives rows, unless it said that there would be none."""
        launch = self.in_flight[index % len(self.in_flight)]
        name, stage = launch.request.request_id, launch.stage
        model = self.models[name]
        if stage in model.ended or name in self.ended:
            return
        self.give_rows(name, stage, num_rows if model.rows[stage] else max(num_rows, 1), is_last)
        if is_last:
            model.ended.add(stage)
        self.check()

    def give_rows(self, name: str, stage: str, num_rows: int, is_last: bool) -> None:
        self.machine.rows_made(name, stage, "rows", num_rows, is_last, 0.0)
        self.models[name].rows[stage] += num_rows

    def use_up(self, index: int) -> None:
        """A stage at work takes a chunk, where it has one."""
        launch = self.in_flight[index % len(self.in_flight)]
        name, stage = launch.request.request_id, launch.stage
        model = self.models[name]
        for (reader, source), num_taken in list(model.taken.items()):
            if reader == stage and num_taken < len(model.given[stage, source]) and name not in self.ended:
                self.machine.chunk_consumed(name, stage, source, 0.0)
                model.taken[stage, source] += 1
                self.check()
                return

    def finish(self, index: int) -> None:
        launch = self.in_flight.pop(index % len(self.in_flight))
        name, stage = launch.request.request_id, launch.stage
        model = self.models[name]
        value = Value()
        self.values.append(weakref.ref(value))
        tensors: dict[str, Any] = {"out": value}
        if not model.rows[stage]:
            self.give_rows(name, stage, 1 + index % 5, is_last=True)
        self.machine.stage_done(name, stage, StagePayload(name, stage, tensors, model.meta[stage]), {}, 0.0)
        model.done.add(stage)
        model.ended.add(stage)
        self.paused.discard((name, stage))
        self.check()

    def give_up(self, name: str, fails: bool) -> None:
        """Ends a request early, by a stage that fails or by the caller."""
        mine = [launch for launch in self.in_flight if launch.request.request_id == name]
        if fails and mine:
            self.machine.stage_failed(name, mine[0].stage, StageError("no"))
            self.in_flight.remove(mine[0])
        else:
            self.machine.abort(name)
        self.check()

    def alive(self) -> list[tuple[str, Model]]:
        return [(name, model) for name, model in self.models.items() if name not in self.ended]

    def check(self) -> None:
        self.machine.check_integrity()
        for end in self.machine.take_ends():
            name = end.request.request_id
            assert name not in self.ended
            self.ended[name] = end.status
            self.paused = {(request_id, stage) for request_id, stage in self.paused if request_id != name}
            still = {launch.stage for launch in self.in_flight if launch.request.request_id == name}
            assert set(end.abandoned) == still
            skipped = {stage for stage, metrics in end.metrics.items() if metrics.get("skipped")}
            model = self.models[name]
            assert skipped == model.skipped() and set(end.metrics) == skipped | model.done
            if end.status is RequestStatus.FINISHED:
                assert model.done == model.started and model.done | skipped == set(self.case.edges)
                assert set(end.payloads) == set(self.case.outputs) - skipped
        for name, model in self.alive():
            state = self.machine._requests.running.get(name)
            assert state is None or set(state.skipped) == model.skipped()


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_exactly_those_stages_run_that_the_conditions_leave_and_are_given_what_was_written(
    case: Case, data: st.DataObject
) -> None:
    play = Play(case)
    play.tick()
    gives_up = data.draw(st.sampled_from([None, None, "fail", "abort"]))
    moves = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=12, max_size=40))
    for move, index in moves:
        if not play.alive():
            break
        if move == 0 and gives_up:
            play.give_up("r1", gives_up == "fail")
            gives_up = None
        elif move == 1 or not play.in_flight:
            play.tick()
        elif move < 6:
            play.write(index, num_rows=max(move - 1, 0), is_last=index == 9)
            play.tick()
        elif move < 8:
            play.use_up(index)
        else:
            play.finish(index)
    while play.alive():
        play.tick()
        if play.in_flight:
            play.finish(0)
    while play.in_flight:
        play.finish(0)  # of requests that were given up
    assert set(play.ended) == set(play.models) and not play.machine.has_work
    assert [ref for ref in play.values if ref() is not None] == []


@settings(max_examples=50, deadline=None)
@given(cases())
def test_without_interleaving_the_answer_depends_on_the_payloads_alone(case: Case) -> None:
    """The first request in the order of the stages, the second backwards: what is given is the same."""
    case.metas[1] = case.metas[0]
    given: dict[str, set[str]] = {}
    for name, index in (("r0", 0), ("r1", -1)):
        play = Play(case)
        while name not in play.ended:
            play.tick()
            if play.in_flight:
                play.finish(index)
        model = play.models[name]
        given[name] = model.done & set(case.outputs)
    assert given["r0"] == given["r1"]
