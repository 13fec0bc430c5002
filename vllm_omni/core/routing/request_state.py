"""One request's way through its stages: what it still waits for, what runs, what is skipped, which outputs somebody has
yet to read. What goes over streamed edges is `RequestStreams`' part.

Knows no other request, no engine and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vllm_omni.config.graph import Edge
from vllm_omni.core.routing.request_plan import RequestPlan
from vllm_omni.core.routing.request_streams import RequestStreams
from vllm_omni.errors import OmniError, SchedulerError, StageError
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StreamChunk
from vllm_omni.request import OmniRequest, Progress, RequestStatus


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """How a request ended."""

    request: OmniRequest
    status: RequestStatus
    payloads: Mapping[str, StagePayload] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    error: OmniError | None = None
    outputs: Sequence[str] = ()  # which entries of the config's `outputs` the caller gets
    params: Mapping[str, StageParams] = field(default_factory=dict)  # of the stages that are done, with their defaults
    abandoned: tuple[str, ...] = ()  # the stages that still work on it and must forget it
    made: Mapping[str, StagePayload | None] = field(default_factory=dict)  # what stages that gave up had made


@dataclass(frozen=True, slots=True)
class RequestPosition:
    """Where an unfinished request is."""

    status: RequestStatus  # WAITING or RUNNING
    num_ahead: int = 0  # of one that waits: those that came before it and wait as well
    running: tuple[str, ...] = ()  # stages
    done: tuple[str, ...] = ()
    progress: Mapping[str, Progress] = field(default_factory=dict)  # of one that streams, by stage that has begun


class RequestState:
    """A stage of the plan is in exactly one of `missing`, `ready`, `running`, `done` and `skipped`."""

    def __init__(self, request: OmniRequest, plan: RequestPlan, order: int, now: float, timeout_s: float) -> None:
        self.request = request
        self.plan = plan
        self.order = order
        self.admitted_s = now
        self.deadline_s = now + timeout_s
        # how many inputs are to come; a streamed one is there with its first chunk
        self.missing = {name: len(stage.edges) for name, stage in plan.stages.items() if stage.edges}
        self.ready = {name: now for name, stage in plan.stages.items() if not stage.edges}
        self.running: dict[str, float] = {}  # since when
        self.is_caller_behind = False  # partial outputs pile up unread
        self.is_again = False  # it has been begun from the start once more
        self.done: set[str] = set()
        self.skipped: dict[str, str] = {}  # why
        self.dropped_readers: list[str] = []  # skipped stages that rows may have been streamed to, to be announced
        self.payloads: dict[str, StagePayload] = {}
        self.metrics: dict[str, dict[str, Any]] = {}
        self.cache_keys: dict[str, str] = {}
        self.made: dict[str, StagePayload | None] = {}  # by stages that gave up
        self.streams = RequestStreams(edge for stage in plan.stages.values() for edge in stage.edges)
        # The edges that a stage which has not started counts on. One leaves when its stage starts or is skipped, or
        # when it turns out to bring nothing.
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
        return bool(self.missing) and not self.ready and not self.running and not self.streams.is_caller_writing

    @property
    def is_at_work(self) -> bool:
        """Whether all that it can do is to wait for the stages that run: there is nobody to begin, feed or pause."""
        is_quiet = not (self.ready or self.missing or self.dropped_readers or self.is_caller_behind)
        return is_quiet and self.streams.is_empty

    def from_the_start(self, now: float) -> RequestState:
        """The same request before its first stage, with the deadline that it has."""
        state = RequestState(self.request, self.plan, self.order, self.admitted_s, self.deadline_s - self.admitted_s)
        state.ready = dict.fromkeys(state.ready, now)
        state.is_caller_behind, state.is_again = self.is_caller_behind, True
        return state

    def launch(self, stage: str, now: float) -> dict[str, Any]:
        """Takes a ready stage's inputs out; what no other stage reads is held no longer."""
        ready_s = self.ready.pop(stage)
        self.running[stage] = now
        self.metrics[stage] = {"queued_s": now - ready_s, "started_s": now - self.admitted_s}
        if self.plan.stages[stage].seed is not None:
            self.metrics[stage]["seed"] = self.plan.stages[stage].seed
        inputs = {edge.target_port: self._input(edge) for edge in self._awaited.pop(stage)}
        self._forget_unread()
        return inputs

    def add_rows(self, stage: str, port: str, num_rows: int, is_last: bool, now: float) -> list[Edge]:
        """A running stage has made rows of a port: the edges that they go over. StageError where they cannot be."""
        if num_rows:
            self.metrics[stage].setdefault("first_rows_s", now - self.running[stage])
        readers = self.streams.readers((stage, port))
        self._begin(self.streams.push((stage, port), num_rows, is_last), now)
        return readers

    def add_text(self, edge: Edge, num_rows: int, is_last: bool, now: float) -> bool:
        """The caller has brought rows over an edge of the plan; whether somebody is still to read them. StageError for
        rows after the last.
        """
        is_read = edge in self.streams.readers(edge.origin)
        self._begin(self.streams.push(edge.origin, num_rows, is_last), now)
        return is_read

    def consume_chunk(self, stage: str, port: str, now: float) -> None:
        """A running stage has consumed a chunk of a port; StageError where it had none."""
        if not any(edge.target_port == port and edge.takes_chunks for edge in self.plan.stages[stage].edges):
            raise StageError(f"stage {stage!r} consumed a chunk of {port!r}, an input that brings it none")
        self.streams.consume(stage, port, now)

    def complete(self, stage: str, payload: StagePayload, metrics: Mapping[str, Any], now: float) -> None:
        """Marks a running stage done, hands its outputs to those readers whose condition holds, and skips what cannot
        run without the others. StageError when an output is not there, or when a condition cannot be decided; what the
        caller gets of this stage is kept all the same.
        """
        # 1 the stage is done, and the caller's part of its payload is kept
        started_s = self.running.pop(stage)
        self.done.add(stage)
        self.metrics[stage].update({"ran_s": now - started_s, **metrics})
        if stage in self.plan.kept:
            tensors = {port: payload.tensors[port] for port in self.plan.kept[stage] if port in payload.tensors}
            self.payloads[stage] = replace(payload, tensors=tensors)
        self.streams.drop(self.plan.stages[stage].edges)
        # 2 every condition is decided before anything is handed on
        edges = [edge for edge in self._edges_from(stage) if edge.stream is None]
        is_taken = [_is_taken(edge, payload) for edge in edges]
        # 3 readers that lose an input go on without it or are skipped; the others get it
        for edge, taken in zip(edges, is_taken, strict=True):
            if not taken:
                self._lose(edge, f"{edge}: when '{edge.when}' is false", now)
        for edge, taken in zip(edges, is_taken, strict=True):
            if taken and edge.target not in self.skipped:
                self._deliver(edge, payload, now)
        # 4 streams from it end
        self._begin(self.streams.close(stage), now)

    def drop(self, stage: str, made: StagePayload | None = None) -> None:
        """A running stage gave up: there will be no payload. made: what there was of one."""
        del self.running[stage]
        self.made[stage] = made

    def end(self, status: RequestStatus, error: OmniError | None) -> RequestEnd:
        """The last word; drop the state after it."""
        ended = self.done.union(self.skipped)
        metrics = {stage: values for stage, values in self.metrics.items() if stage in ended}
        params = {stage: self.plan.stages[stage].seeded_params for stage in self.plan.stages if stage in self.done}
        return RequestEnd(
            self.request,
            status,
            dict(self.payloads),
            metrics,
            error,
            self.plan.outputs,
            params,
            tuple(self.running),
            self.made,
        )

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
        awaited = self._whole_origins()
        if not awaited.issuperset(self._values):
            raise SchedulerError(f"{where}: holds {list(self._values)}, read are {sorted(awaited)}")
        self.streams.check_integrity(self.running, self.done.union(self.skipped))
        for stage in self._awaited:
            self._check_waiting(stage, where)

    def _check_waiting(self, stage: str, where: str) -> None:
        """A stage that has not started: its count, that nothing it needs is lost, and that somebody wants it."""
        edges, plan = self._awaited[stage], self.plan.stages[stage]
        num_missing = sum(not self._is_there(edge) for edge in edges)
        if self.missing.get(stage, 0) != num_missing or any(
            (edge.source in self.done) != (edge.origin in self._values) for edge in edges if edge.stream is None
        ):
            raise SchedulerError(
                f"{where}: {stage!r} misses {num_missing} inputs, its count says {self.missing.get(stage, 0)}"
            )
        lost = {edge.target_port for edge in plan.edges if edge not in edges}
        if lost & plan.required_inputs:
            raise SchedulerError(f"{where}: {stage!r} waits, but will never have {sorted(lost & plan.required_inputs)}")
        if any(edge.source in self.skipped for edge in edges) or self._is_in_vain(stage):
            raise SchedulerError(f"{where}: {stage!r} waits for a stage that is skipped, or works for such alone")

    def _edges_from(self, stage: str) -> list[Edge]:
        """What stages that have not started still expect of this one."""
        return [edge for edges in self._awaited.values() for edge in edges if edge.source == stage]

    def _is_there(self, edge: Edge) -> bool:
        return edge.source in self.done if edge.stream is None else self.streams.has_chunk(edge)

    def _input(self, edge: Edge) -> Any:
        """What a stage starts with."""
        if edge.stream is not None:
            return self.streams.first_chunk(edge)
        value = self._values[edge.origin]
        return StreamChunk(value, is_last=True) if edge.takes_chunks else value

    def _begin(self, edges: Iterable[Edge], now: float) -> None:
        """These edges have a chunk, which is the first where the reader has not started."""
        for edge in edges:
            if edge.target in self.missing:
                self._count_down(edge.target, now)

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
            if any(edge.stream is not None for edge in self.plan.stages[stage].edges):
                self.dropped_readers.append(stage)
            self.streams.drop(self.plan.stages[stage].edges)
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
        self._forget_unread()

    def _is_required(self, edge: Edge) -> bool:
        return edge.target_port in self.plan.stages[edge.target].required_inputs

    def _leave_out(self, edge: Edge, now: float) -> None:
        self._awaited[edge.target].remove(edge)
        self.streams.drop([edge])
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

    def _whole_origins(self) -> set[tuple[str, str]]:
        """What stages that have not started read whole."""
        return {edge.origin for edges in self._awaited.values() for edge in edges if edge.stream is None}

    def _forget_unread(self) -> None:
        awaited = self._whole_origins()
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
    if isinstance(value, Tensor) and value.numel() == 0 and not edge.takes_chunks:
        raise StageError(
            f"stage {edge.source!r} gave an empty {edge.source_port!r} {list(value.shape)}, {reader}; "
            "if it wrote nothing, raise its min_tokens, or say `when: text` on the edge"
        )
    return value
