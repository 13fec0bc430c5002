"""One request's way through its stages: what it still waits for, what runs, what is skipped, which outputs somebody has
yet to read.

Knows no other request, no engine and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.errors import OmniError, SchedulerError, StageError
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload
from vllm_omni.request import OmniRequest, RequestStatus


def _never_cached(inputs: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How one request uses one stage.

    edges: those into the stage that are read, one a port. cache_key: complete inputs -> a key under which the payload
    may serve other requests, or None; may raise an OmniError. required_inputs: the ports without which the stage does
    not run.
    """

    params: StageParams
    edges: Sequence[Edge] = ()
    cache_key: Callable[[Mapping[str, Any]], str | None] = _never_cached
    required_inputs: frozenset[str] = frozenset()


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
    """Every stage that the graph's outputs call for, all its edges read, parameters unset."""
    if graph is None:
        return RequestPlan()
    demand = graph.demand(lambda stage: frozenset(graph.signatures[stage].inputs))
    stages = {
        stage: StagePlan(
            StageParams(), graph.edges_into(stage), required_inputs=graph.signatures[stage].required_inputs
        )
        for stage in demand
    }
    return RequestPlan(stages, kept_ports(graph))


def kept_ports(graph: StageGraph) -> dict[str, frozenset[str]]:
    """Stages that `outputs` lists -> the ports to keep of their payloads: the port it names, or the stage's results."""
    kept: dict[str, frozenset[str]] = {}
    for entry in graph.outputs:
        stage, _, port = entry.partition(".")
        ports = frozenset({port}) if port else graph.signatures[stage].results
        kept[stage] = kept.get(stage, frozenset()) | ports
    return kept


class RequestState:
    """A stage of the plan is in exactly one of `missing` (inputs to come), `ready`, `running`, `done` and `skipped`.

    missing: how many inputs are to come. skipped: why. A stage that has not started counts on the edges in `_awaited`;
    an edge leaves them when its stage starts or is skipped, or when it turns out to bring nothing.
    """

    def __init__(self, request: OmniRequest, plan: RequestPlan, order: int, now: float, timeout_s: float) -> None:
        self.request = request
        self.plan = plan
        self.order = order
        self.admitted_s = now
        self.deadline_s = now + timeout_s
        self.missing = {name: len(stage.edges) for name, stage in plan.stages.items() if stage.edges}
        self.ready = {name: now for name, stage in plan.stages.items() if not stage.edges}
        self.running: dict[str, float] = {}
        self.done: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.payloads: dict[str, StagePayload] = {}
        self.metrics: dict[str, dict[str, Any]] = {}
        self.cache_keys: dict[str, str] = {}
        self._awaited = {name: list(stage.edges) for name, stage in plan.stages.items()}
        self._values: dict[tuple[str, str], Any] = {}

    @property
    def priority(self) -> str:
        return self.request.priority

    @property
    def job_size(self) -> float:
        return self.plan.job_size

    @property
    def is_done(self) -> bool:
        return len(self.done) + len(self.skipped) == len(self.plan.stages)

    @property
    def is_stalled(self) -> bool:
        """Whether nothing that could still happen will bring this request further."""
        return bool(self.missing) and not self.ready and not self.running

    def launch(self, stage: str, now: float) -> dict[str, Any]:
        """Takes a ready stage's inputs out; what no other stage reads is held no longer."""
        ready_s = self.ready.pop(stage)
        self.running[stage] = now
        self.metrics[stage] = {"queued_s": now - ready_s, "started_s": now - self.admitted_s}
        inputs = {edge.target_port: self._values[edge.origin] for edge in self._awaited.pop(stage)}
        self._let_go()
        return inputs

    def complete(self, stage: str, payload: StagePayload, metrics: Mapping[str, Any], now: float) -> None:
        """Marks a running stage done, hands its outputs to those readers whose condition holds, and skips what cannot
        run without the others. StageError when an output is not there, or when a condition cannot be decided.
        """
        started_s = self.running.pop(stage)
        self.done.add(stage)
        self.metrics[stage].update({"ran_s": now - started_s, **metrics})
        edges = self._edges_from(stage)
        is_taken = [_is_taken(edge, payload) for edge in edges]
        for edge, taken in zip(edges, is_taken, strict=True):
            if not taken:
                self._lose(edge, f"{edge}: when '{edge.when}' is false", now)
        for edge, taken in zip(edges, is_taken, strict=True):
            if taken and edge.target not in self.skipped:
                self._deliver(edge, payload, now)
        if stage in self.plan.kept:
            tensors = {port: payload.tensors[port] for port in self.plan.kept[stage] if port in payload.tensors}
            self.payloads[stage] = replace(payload, tensors=tensors)

    def drop(self, stage: str) -> None:
        """A running stage gave up: there will be no payload."""
        del self.running[stage]

    def end(self, status: RequestStatus, error: OmniError | None) -> RequestEnd:
        """The last word; drop the state after it."""
        settled = self.done.union(self.skipped)
        metrics = {stage: values for stage, values in self.metrics.items() if stage in settled}
        return RequestEnd(self.request, status, dict(self.payloads), metrics, error, tuple(self.running))

    def check_integrity(self) -> None:
        """Raises SchedulerError when a stage is in two places, waits for what will never come or for nobody, or when an
        output is held that nobody will read.
        """
        where = f"request {self.request.request_id!r}"
        places = [*self.missing, *self.ready, *self.running, *self.done, *self.skipped]
        if sorted(places) != sorted(self.plan.stages):
            raise SchedulerError(f"{where}: stages {places}, expected each of the plan once")
        if {*self.missing, *self.ready} != set(self._awaited):
            raise SchedulerError(f"{where}: inputs of {list(self._awaited)}, expected those of the stages to start")
        awaited = {edge.origin for edges in self._awaited.values() for edge in edges}
        if not awaited.issuperset(self._values):
            raise SchedulerError(f"{where}: holds {list(self._values)}, read are {sorted(awaited)}")
        for stage in self._awaited:
            self._check_waiting(stage, where)

    def _check_waiting(self, stage: str, where: str) -> None:
        """A stage that has not started: its count, that nothing it needs is lost, and that somebody wants it."""
        edges, plan = self._awaited[stage], self.plan.stages[stage]
        num_missing = sum(edge.source not in self.done for edge in edges)
        if self.missing.get(stage, 0) != num_missing or any(
            (edge.source in self.done) != (edge.origin in self._values) for edge in edges
        ):
            raise SchedulerError(
                f"{where}: {stage!r} misses {num_missing} inputs, books say {self.missing.get(stage, 0)}"
            )
        lost = {edge.target_port for edge in plan.edges if edge not in edges}
        if lost & plan.required_inputs:
            raise SchedulerError(f"{where}: {stage!r} waits, but will never have {sorted(lost & plan.required_inputs)}")
        if any(edge.source in self.skipped for edge in edges) or self._is_in_vain(stage):
            raise SchedulerError(f"{where}: {stage!r} waits for a stage that is skipped, or works for such alone")

    def _edges_from(self, stage: str) -> list[Edge]:
        """What stages that have not started still expect of this one."""
        return [edge for edges in self._awaited.values() for edge in edges if edge.source == stage]

    def _deliver(self, edge: Edge, payload: StagePayload, now: float) -> None:
        self._values[edge.origin] = _value_for(edge, payload)
        self._count_down(edge.target, now)

    def _lose(self, edge: Edge, reason: str, now: float) -> None:
        """The edge brings nothing: its stage goes on without it, or is skipped."""
        if self._is_required(edge):
            self._skip(edge.target, reason, now)
        elif edge.target not in self.skipped:  # over another edge, a moment ago
            self._leave_out(edge, now)

    def _skip(self, stage: str, reason: str, now: float) -> None:
        """Skips a stage, those that cannot run without it, and those that would have worked for these alone."""
        to_skip = [stage]
        while to_skip:
            stage = to_skip.pop()
            if stage in self.skipped:
                continue
            sources = [edge.source for edge in self._awaited.pop(stage)]
            self.missing.pop(stage, None)
            self.ready.pop(stage, None)
            self.skipped[stage] = reason
            self.metrics[stage] = {"skipped": True, "reason": reason}
            for edge in self._edges_from(stage):
                if self._is_required(edge):
                    to_skip.append(edge.target)
                else:
                    self._leave_out(edge, now)
            to_skip += [source for source in sources if self._is_in_vain(source)]
        self._let_go()

    def _is_required(self, edge: Edge) -> bool:
        return edge.target_port in self.plan.stages[edge.target].required_inputs

    def _leave_out(self, edge: Edge, now: float) -> None:
        self._awaited[edge.target].remove(edge)
        self._count_down(edge.target, now)

    def _is_in_vain(self, stage: str) -> bool:
        """Whether a stage has yet to start, and all that would have read it are skipped."""
        if stage not in self._awaited or stage in self.plan.kept or self._edges_from(stage):
            return False
        return any(edge.source == stage for skipped in self.skipped for edge in self.plan.stages[skipped].edges)

    def _count_down(self, stage: str, now: float) -> None:
        self.missing[stage] -= 1
        if not self.missing[stage]:
            del self.missing[stage]
            self.ready[stage] = now

    def _let_go(self) -> None:
        awaited = {edge.origin for edges in self._awaited.values() for edge in edges}
        self._values = {origin: value for origin, value in self._values.items() if origin in awaited}


def _is_taken(edge: Edge, payload: StagePayload) -> bool:
    try:
        return edge.when is None or edge.when.holds(payload.meta)
    except StageError as error:
        raise StageError(f"{edge}: {error}") from error


def _value_for(edge: Edge, payload: StagePayload) -> Any:
    """What a taken edge brings; StageError where there is nothing to bring."""
    reader = f"which stage {edge.target!r} reads as {edge.target_port!r}"
    try:
        value = payload.port(edge.source_port)
    except KeyError:
        given = sorted({*payload.tensors, *payload.meta})
        fix = f"; if it may leave that out, say `when: {edge.source_port}` on the edge" if edge.is_text else ""
        raise StageError(
            f"stage {edge.source!r} gave no {edge.source_port!r} (it gave {given}), {reader}{fix}"
        ) from None
    if isinstance(value, Tensor) and value.numel() == 0:
        raise StageError(
            f"stage {edge.source!r} gave an empty {edge.source_port!r} {list(value.shape)}, {reader}; "
            "if it wrote nothing, raise its min_tokens, or say `when: text` on the edge"
        )
    return value
