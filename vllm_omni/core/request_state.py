"""One request's way through its stages: what it still waits for, what runs, which outputs somebody has yet to read.

Knows no other request, no engine and no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_omni.config.graph import StageGraph
from vllm_omni.errors import OmniError, SchedulerError, StageError
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload
from vllm_omni.request import OmniRequest, RequestStatus

Source = tuple[str, str]  # a stage and one of its output ports


def _never_cached(inputs: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How one request uses one stage.

    inputs: the ports that are read -> their sources. cache_key: complete inputs -> a key under which the payload may
    serve other requests, or None; may raise an OmniError.
    """

    params: StageParams
    inputs: Mapping[str, Source] = field(default_factory=dict)
    cache_key: Callable[[Mapping[str, Any]], str | None] = _never_cached


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """The stages of one request in topological order.

    kept: the stages whose payload the caller gets -> the tensors of it to keep. job_size: for shortest job first.
    """

    stages: Mapping[str, StagePlan] = field(default_factory=dict)
    kept: Mapping[str, frozenset[str]] = field(default_factory=dict)
    job_size: float = 1.0


@dataclass(frozen=True, slots=True)
class Launch:
    """A stage whose inputs are complete and that now counts as running."""

    request: OmniRequest
    stage: str
    params: StageParams
    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """How a request ended. abandoned: the stages that still work on it and must forget it."""

    request: OmniRequest
    status: RequestStatus
    payloads: Mapping[str, StagePayload] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    error: OmniError | None = None
    abandoned: tuple[str, ...] = ()


def default_plan(graph: StageGraph | None) -> RequestPlan:
    """Every stage that the outputs call for, with all its inputs and unset parameters; empty without a graph."""
    if graph is None:
        return RequestPlan()
    demand = graph.demand(lambda stage: frozenset(edge.target_port for edge in graph.edges_into(stage)))
    stages = {
        name: StagePlan(StageParams(), read_inputs(graph, name, demand[name])) for name in graph.order if name in demand
    }
    return RequestPlan(stages, kept_ports(graph))


def read_inputs(graph: StageGraph, stage: str, ports: frozenset[str]) -> dict[str, Source]:
    """Where the inputs among `ports` come from."""
    return {
        edge.target_port: (edge.source, edge.source_port)
        for edge in graph.edges_into(stage)
        if edge.target_port in ports
    }


def kept_ports(graph: StageGraph) -> dict[str, frozenset[str]]:
    """Stages that `outputs` lists -> the ports to keep of their payloads: the port it names, or the stage's results."""
    kept: dict[str, frozenset[str]] = {}
    for entry in graph.outputs:
        stage, _, port = entry.partition(".")
        ports = frozenset({port}) if port else graph.signatures[stage].results
        kept[stage] = kept.get(stage, frozenset()) | ports
    return kept


class RequestState:
    """A stage of the plan is in exactly one of `missing` (inputs to come), `ready`, `running` and `done`."""

    def __init__(self, request: OmniRequest, plan: RequestPlan, order: int, now: float, timeout_s: float) -> None:
        self.request = request
        self.plan = plan
        self.order = order
        self.admitted_s = now
        self.deadline_s = now + timeout_s
        self.missing = {name: len(stage.inputs) for name, stage in plan.stages.items() if stage.inputs}
        self.ready = {name: now for name, stage in plan.stages.items() if not stage.inputs}
        self.running: dict[str, float] = {}
        self.done: set[str] = set()
        self.payloads: dict[str, StagePayload] = {}
        self.metrics: dict[str, dict[str, Any]] = {}
        self.cache_keys: dict[str, str] = {}
        self._readers = Counter(source for stage in plan.stages.values() for source in stage.inputs.values())
        self._values: dict[Source, Any] = {}

    @property
    def priority(self) -> str:
        return self.request.priority

    @property
    def job_size(self) -> float:
        return self.plan.job_size

    @property
    def is_done(self) -> bool:
        return len(self.done) == len(self.plan.stages)

    @property
    def is_stalled(self) -> bool:
        """Whether nothing that could still happen will bring this request further."""
        return bool(self.missing) and not self.ready and not self.running

    def launch(self, stage: str, now: float) -> dict[str, Any]:
        """Takes a ready stage's inputs out; what no other stage reads is held no longer."""
        ready_s = self.ready.pop(stage)
        self.running[stage] = now
        self.metrics[stage] = {"queued_s": now - ready_s, "started_s": now - self.admitted_s}
        return {port: self._take(source) for port, source in self.plan.stages[stage].inputs.items()}

    def complete(self, stage: str, payload: StagePayload, metrics: Mapping[str, Any], now: float) -> None:
        """Marks a running stage done and hands its outputs to its readers; StageError when one is not there."""
        started_s = self.running.pop(stage)
        self.done.add(stage)
        self.metrics[stage].update({"ran_s": now - started_s, **metrics})
        for name, plan in self.plan.stages.items():
            for port, source in plan.inputs.items():
                if source[0] == stage:
                    self._deliver(name, port, source, payload, now)
        if stage in self.plan.kept:
            tensors = {port: payload.tensors[port] for port in self.plan.kept[stage] if port in payload.tensors}
            self.payloads[stage] = replace(payload, tensors=tensors)

    def drop(self, stage: str) -> None:
        """A running stage gave up: there will be no payload."""
        del self.running[stage]

    def end(self, status: RequestStatus, error: OmniError | None) -> RequestEnd:
        """The last word; drop the state after it."""
        metrics = {stage: values for stage, values in self.metrics.items() if stage in self.done}
        return RequestEnd(self.request, status, dict(self.payloads), metrics, error, tuple(self.running))

    def check_integrity(self) -> None:
        """Raises SchedulerError when a stage is in two places or an output is held that nobody will read."""
        places = [*self.missing, *self.ready, *self.running, *self.done]
        if sorted(places) != sorted(self.plan.stages):
            raise SchedulerError(
                f"request {self.request.request_id!r}: stages {places}, expected each of the plan once"
            )
        waiting = {*self.missing, *self.ready}
        readers = Counter(source for name in waiting for source in self.plan.stages[name].inputs.values())
        if readers != +self._readers or any(not readers[source] for source in self._values):
            raise SchedulerError(f"request {self.request.request_id!r}: holds {list(self._values)}, read by {readers}")

    def _take(self, source: Source) -> Any:
        self._readers[source] -= 1
        return self._values[source] if self._readers[source] else self._values.pop(source)

    def _deliver(self, stage: str, port: str, source: Source, payload: StagePayload, now: float) -> None:
        try:
            self._values[source] = payload.port(source[1])
        except KeyError:
            given = sorted({*payload.tensors, *payload.meta})
            raise StageError(
                f"stage {source[0]!r} gave no {source[1]!r} (it gave {given}), which stage {stage!r} reads as {port!r}"
            ) from None
        self.missing[stage] -= 1
        if not self.missing[stage]:
            del self.missing[stage]
            self.ready[stage] = now
