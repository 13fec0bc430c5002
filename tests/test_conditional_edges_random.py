"""Random graphs, conditions and payloads against a model that works out from scratch who must be skipped."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from test_omni_scheduler import request

from vllm_omni.config.graph import StageGraph
from vllm_omni.config.schema import EdgeConfig, OmniConfig, StageConfig
from vllm_omni.core.omni_scheduler import OmniScheduler
from vllm_omni.core.orders import Launch
from vllm_omni.errors import StageError
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec
from vllm_omni.request import RequestStatus

SPEC = TensorSpec(("T",))
CONDITIONS = {"": lambda meta: True, "x": lambda meta: meta.get("x"), "not x": lambda meta: not meta.get("x")}
CONDITIONS |= {"x and y": lambda meta: meta.get("x") and meta.get("y"), "y == 2": lambda meta: meta.get("y") == 2}


class Value:
    """What a port gives; not a tensor, so that a test can watch it go."""


@dataclass
class Case:
    """Stages by name -> sources with (condition, whether it is required); what each stage's payload will say."""

    edges: dict[str, dict[str, tuple[str, bool]]]
    outputs: list[str]
    metas: list[dict[str, dict[str, int]]] = field(default_factory=list)

    def graph(self) -> StageGraph:
        stages, signatures = {}, {}
        for name, sources in self.edges.items():
            inputs = {source: EdgeConfig(f"{source}.out", text or None) for source, (text, _) in sources.items()}
            stages[name] = StageConfig(name=name, kind="toy", inputs=inputs)
            required = frozenset(source for source, (_, is_required) in sources.items() if is_required)
            signatures[name] = StageSignature(dict.fromkeys(sources, SPEC), {"out": SPEC}, required, frozenset({"out"}))
        return StageGraph(stages, signatures, self.outputs)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    edges: dict[str, dict[str, tuple[str, bool]]] = {}
    for index in range(draw(st.integers(2, 7))):
        sources = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        edge = st.tuples(st.sampled_from(sorted(CONDITIONS)), st.booleans())
        edges[f"s{index}"] = {f"s{source}": draw(edge) for source in sorted(sources)}
    read = {source for sources in edges.values() for source in sources}
    listed = draw(st.sets(st.sampled_from(sorted(edges)), max_size=2))
    metas = st.fixed_dictionaries({}, optional={"x": st.integers(0, 1), "y": st.integers(1, 2)})
    by_stage = st.fixed_dictionaries(dict.fromkeys(edges, metas))
    return Case(edges, [name for name in edges if name not in read or name in listed], [draw(by_stage), draw(by_stage)])


class Model:
    """What must be true of one request, given which of its stages have started and which are done."""

    def __init__(self, case: Case, meta: dict[str, dict[str, int]]) -> None:
        self.case = case
        self.meta = meta
        self.started: set[str] = set()
        self.done: set[str] = set()

    def is_lost(self, stage: str, source: str, skipped: set[str]) -> bool:
        text, _ = self.case.edges[stage][source]
        return source in skipped or (source in self.done and not CONDITIONS[text](self.meta[source]))

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
        if any(required and self.is_lost(stage, source, skipped) for source, (_, required) in sources.items()):
            return True
        readers = {other for other, read in self.case.edges.items() if stage in read}
        return stage not in self.case.outputs and bool(readers) and readers <= skipped

    def ready(self) -> dict[str, set[str]]:
        """Stages that must launch now -> the inputs they get."""
        skipped = self.skipped()
        return {
            stage: {source for source in sources if not self.is_lost(stage, source, skipped)}
            for stage, sources in self.case.edges.items()
            if stage not in skipped | self.started and set(sources) <= self.done | skipped
        }


class Play:
    """A scheduler with one request per meta, and their models."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.machine = OmniScheduler(OmniConfig(), case.graph())
        self.models = {f"r{index}": Model(case, meta) for index, meta in enumerate(case.metas)}
        self.in_flight: list[Launch] = []
        self.values: list[weakref.ref[Value]] = []
        self.ended: dict[str, Any] = {}
        for name in self.models:
            self.machine.schedule(request(name))

    def tick(self) -> None:
        expected = {(name, stage): ports for name, model in self.alive() for stage, ports in model.ready().items()}
        launches = self.machine.tick(0.0)
        assert {(launch.request.request_id, launch.stage): set(launch.inputs) for launch in launches} == expected
        for launch in launches:
            self.models[launch.request.request_id].started.add(launch.stage)
        self.in_flight += launches
        self.check()

    def finish(self, index: int) -> None:
        launch = self.in_flight.pop(index % len(self.in_flight))
        name, stage = launch.request.request_id, launch.stage
        value = Value()
        self.values.append(weakref.ref(value))
        meta = self.models[name].meta[stage]
        payload: Any = StagePayload(name, stage, {"out": value}, meta)  # type: ignore[dict-item]
        self.machine.stage_done(name, stage, payload, {}, 0.0)
        self.models[name].done.add(stage)
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
            still = {launch.stage for launch in self.in_flight if launch.request.request_id == name}
            assert set(end.abandoned) == still
            skipped = {stage for stage, metrics in end.metrics.items() if metrics.get("skipped")}
            model = self.models[name]
            assert skipped == model.skipped() and set(end.metrics) == skipped | model.done
            if end.status is RequestStatus.FINISHED:
                assert model.done == model.started and model.done | skipped == set(self.case.edges)
                assert set(end.payloads) == set(self.case.outputs) - skipped
        for name, model in self.alive():
            state = self.machine._ledger.running.get(name)
            assert state is None or set(state.skipped) == model.skipped()


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_exactly_those_stages_run_that_the_conditions_leave(case: Case, data: st.DataObject) -> None:
    play = Play(case)
    play.tick()
    gives_up = data.draw(st.sampled_from([None, None, "fail", "abort"]))
    for _ in range(4 * len(case.edges)):
        if not play.alive():
            break
        move = data.draw(st.integers(0, 5))
        if move == 0 and gives_up:
            play.give_up("r1", gives_up == "fail")
            gives_up = None
        elif move > 1 and play.in_flight:
            play.finish(move + data.draw(st.integers(0, 7)))
        else:
            play.tick()
    while play.alive():
        play.tick()
        if play.in_flight:
            play.finish(0)
    while play.in_flight:
        play.finish(0)  # late news of requests that were given up
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
