"""Admission, order and routing of requests through the stages: a pure state machine.

Time is an argument, nothing runs by itself, no engine is known and no tensor's data is touched: `tick` gives the orders
that are to be carried out, `rows_made`, `chunk_consumed`, `stage_done` and `stage_failed` say what the stages did, and
`take_ends` gives every request's one and only end.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Any

from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.config.schema import OmniConfig
from vllm_omni.core.routing.config_update import check_update
from vllm_omni.core.routing.policies import make_policy
from vllm_omni.core.routing.prompt_cache import PromptCache
from vllm_omni.core.routing.request_plan import RequestPlan, default_plan
from vllm_omni.core.routing.request_state import RequestEnd, RequestPosition, RequestState
from vllm_omni.core.routing.request_table import RequestTable
from vllm_omni.errors import (
    OmniError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    SchedulerError,
    StageError,
)
from vllm_omni.messages import Feed, Order, Pause, Resume, Skip, StageTask
from vllm_omni.payload import StagePayload
from vllm_omni.request import OmniRequest, RequestStatus
from vllm_omni.utils.checks import did_you_mean


class OmniScheduler:
    """Owns every unfinished request and the prompt embeddings that outlive one.

    Accepts requests from construction on until `stop` or `shutdown`. Requests without a plan only queue when there is
    no graph.
    """

    def __init__(self, config: OmniConfig, graph: StageGraph | None = None) -> None:
        config.validate()
        self._config = config
        self._graph = graph
        self._policy = make_policy(config.scheduler)
        self._prompts = PromptCache(config.dit_cache.prompt_embeds_mb)
        self._is_started = False
        self._is_stopped = False
        self._requests = RequestTable()
        self._held_back: frozenset[str] = frozenset()

    def start(self) -> None:
        """Accepts requests, also again after `stop`; may be called twice."""
        self._is_started, self._is_stopped = True, False

    def stop(self) -> None:
        """Drains: admits nothing more, whatever was admitted goes on to its end."""
        self._is_started, self._is_stopped = False, True

    def shutdown(self) -> None:
        """At once: admits nothing more, everything unfinished ends ABORTED."""
        self.stop()
        for state in self._requests.unfinished():
            self._requests.end(
                state.request.request_id, RequestStatus.ABORTED, RequestAbortedError("the scheduler was shut down")
            )

    def ensure_accepts(self, request_id: str) -> None:
        """Raises SchedulerError when stopped or when the id is in use, QueueFullError when too many wait."""
        if self._is_stopped:
            raise SchedulerError(f"request {request_id!r}: the scheduler is stopped; call start() or make a new one")
        self._requests.ensure_unused(request_id)
        limit = self._config.scheduler.max_queue_size
        if len(self._requests.waiting) >= limit:
            raise QueueFullError(
                f"{len(self._requests.waiting)} requests wait; retry later or raise scheduler.max_queue_size ({limit})"
            )

    def schedule(self, request: OmniRequest, plan: RequestPlan | None = None, *, now: float = 0.0) -> bool:
        """Admits a request: True, or one of `ensure_accepts`'s errors, or SchedulerError for an unknown priority.

        plan: how it uses the stages; without one, every stage that the graph's outputs call for, with unset parameters.
        now: seconds on any clock that the later calls share; the deadline counts from here.
        """
        self.ensure_accepts(request.request_id)
        weights = self._config.scheduler.priority_weights
        if request.priority not in weights:
            raise SchedulerError(f"priority: got {request.priority!r}{did_you_mean(str(request.priority), weights)}")
        timeout_s = self._config.request_timeout if request.timeout_s is None else request.timeout_s
        order = self._requests.num_admitted
        self._requests.admit(RequestState(request, plan or default_plan(self._graph), order, now, timeout_s))
        return True

    def reject(self, request: OmniRequest, error: OmniError) -> None:
        """Ends a request that was never admitted; SchedulerError when its id is in use."""
        self._requests.reject(request, error)

    def abort(self, request_id: str) -> None:
        """Ends a request ABORTED; an unknown or finished one is left alone."""
        self._requests.end(
            request_id, RequestStatus.ABORTED, RequestAbortedError(f"request {request_id!r} was aborted")
        )

    def fail(self, request_id: str, error: OmniError) -> None:
        """Ends a request FAILED; an unknown or finished one is left alone."""
        self._requests.end(request_id, RequestStatus.FAILED, error)

    def set_caller_behind(self, request_id: str, is_behind: bool) -> None:
        """While the caller of a stream does not keep up, the stages that write for it pause; nothing for an unknown or
        finished request.
        """
        state = self._requests.running.get(request_id) or self._requests.waiting.get(request_id)
        if state is not None:
            state.is_caller_behind = is_behind

    def tick(self, now: float) -> list[Order]:
        """Ends what is overdue, starts waiting requests up to `max_running`, launches what has its inputs and hands on
        what was streamed. The orders are to be carried out as they come.
        """
        for state in self._requests.unfinished():
            if now >= state.deadline_s:
                self._time_out(state)
        self._start_waiting(now)
        orders: list[Order] = []
        for request_id, state in list(self._requests.running.items()):
            if state.is_at_work:
                continue
            while state.ready and request_id in self._requests.running:
                orders += self._launch(state, next(iter(state.ready)), now)
            if request_id in self._requests.running:
                orders += self._stream(state, now)
            if state.is_stalled:
                missing = ", ".join(state.missing)
                self.fail(request_id, SchedulerError(f"nothing runs that could feed the stages {missing}"))
        return orders

    def hold_back(self, busy: Collection[str], devices: Mapping[str, Collection[Hashable]]) -> frozenset[str]:
        """The stages not to be stepped now: a busy stage that they come before works on the first chunk of a stream, so
        somebody waits for the first audio, and on the same device they would only delay it.

        busy: stages that could do a step. devices: of every stage, those of its replicas.
        """
        held: set[str] = set()
        if self._graph is not None:
            urgent: set[str] = set()
            for state in self._requests.running.values():
                if state.streams.is_empty:
                    continue
                urgent |= state.streams.on_first_chunk(state.running)
            for stage in urgent.intersection(busy):
                before = self._graph.before({stage})
                held |= {other for other in before if not set(devices[other]).isdisjoint(devices[stage])}
        self._held_back = frozenset(held)
        return self._held_back

    def is_waiting(self, request_id: str, stage: str) -> bool:
        """Whether a running stage may have nothing to do for a request: it is paused, or chunks are still to come."""
        state = self._requests.running.get(request_id)
        return state is not None and state.streams.is_waiting(stage)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether an admitted request has yet to end."""
        return self._requests.is_unfinished(request_id)

    def rows_made(self, request_id: str, stage: str, port: str, num_rows: int, is_last: bool, now: float) -> list[Edge]:
        """A running stage has made so many rows of a port: the edges that they go over, for the hosts of the readers to
        keep. None when the request or the stage has ended.
        """
        state = self._requests.working_on(request_id, stage)
        if state is None:
            return []
        try:
            return state.add_rows(stage, port, num_rows, is_last, now)
        except StageError as error:
            self.fail(request_id, error)
            return []

    def text_came(self, request_id: str, edge: Edge, num_rows: int, is_last: bool, now: float) -> bool:
        """The caller has brought so many rows over an edge of an unfinished request: whether they are to be kept for
        its reader.
        """
        state = self._requests.running.get(request_id) or self._requests.waiting.get(request_id)
        if state is None:
            return False
        try:
            return state.add_text(edge, num_rows, is_last, now)
        except StageError as error:
            self.fail(request_id, error)
            return False

    def chunk_consumed(self, request_id: str, stage: str, port: str, now: float) -> None:
        """A running stage has consumed one more chunk of an input; dropped when the request or the stage has ended."""
        state = self._requests.working_on(request_id, stage)
        if state is None:
            return
        try:
            state.consume_chunk(stage, port, now)
        except StageError as error:
            self.fail(request_id, error)

    def stage_done(
        self, request_id: str, stage: str, payload: StagePayload, metrics: Mapping[str, Any], now: float
    ) -> None:
        """A running stage is done; dropped when the request or the stage has ended."""
        state = self._requests.working_on(request_id, stage)
        if state is None:
            return
        key = state.cache_keys.pop(stage, None)
        if key is not None:
            self._prompts.put(stage, key, payload, metrics)
        self._complete(state, stage, payload, metrics, now)

    def stage_failed(self, request_id: str, stage: str, error: OmniError, made: StagePayload | None = None) -> None:
        """A running stage gave up: the request ends FAILED; dropped when the request or the stage has ended. made: what
        there was of its result.
        """
        state = self._requests.working_on(request_id, stage)
        if state is None:
            return
        state.drop(stage, made)
        self.fail(request_id, error)

    def run_again(self, request_id: str, now: float) -> bool:
        """Begins a running request from its first stage, where that has not been done for it: what its stages had made
        is dropped, and what they still do is nobody's any more. Its deadline stays. Not one whose text comes in
        pieces: nobody keeps those that were read.
        """
        state = self._requests.running.get(request_id)
        if state is None or state.is_again or state.request.is_open:
            return False
        self._requests.running[request_id] = state.from_the_start(now)
        return True

    def take_ends(self) -> list[RequestEnd]:
        """Every end since the last call, in order; each request has exactly one. Its id is free again."""
        return self._requests.take_ends()

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, or its end has not been taken."""
        return not self._requests.is_empty

    def in_flight(self) -> set[tuple[str, str]]:
        """(request id, stage) of every launched stage that is still to end."""
        return set(self._requests.in_flight())

    def find(self, request_id: str) -> RequestPosition | None:
        """Where an unfinished request is; safe to call from another thread."""
        state = self._requests.running.get(request_id)
        if state is not None:
            return RequestPosition(RequestStatus.RUNNING, running=tuple(state.running), done=tuple(state.done))
        waiting = tuple(self._requests.waiting)
        if request_id in waiting:
            return RequestPosition(RequestStatus.WAITING, num_ahead=waiting.index(request_id))
        return None

    def running_plan(self, request_id: str) -> tuple[OmniRequest, RequestPlan] | None:
        """A request that runs, and how it uses the stages; None for any other."""
        state = self._requests.running.get(request_id)
        return None if state is None else (state.request, state.plan)

    def get_status(self) -> dict[str, Any]:
        """Gauges; safe to call from another thread."""
        return {
            "running": self._is_started,
            "accepting": not self._is_stopped,
            "queue_size": len(self._requests.waiting),
            "running_requests": len(self._requests.running),
            "processed_requests": self._requests.counts["processed"],
            "cache_hit_rate": self._prompts.hit_rate,
            "policy": str.__str__(self._config.scheduler.policy),
            "max_queue_size": self._config.scheduler.max_queue_size,
            "max_running": self._config.scheduler.max_running,
        }

    def get_metrics(self) -> dict[str, Any]:
        """Counters since construction: admitted, ends by status, timeouts, stray events, the prompt-embedding cache."""
        counts = self._requests.counts
        ends = {status.value: counts[status.value] for status in RequestStatus if status.is_final}
        return {
            "admitted": self._requests.num_admitted,
            **ends,
            "timed_out": counts["timed_out"],
            "stray_events": counts["stray_events"],
            "prompt_embeds": self._prompts.get_stats(),
        }

    def get_config(self) -> OmniConfig:
        return self._config

    def update_config(self, config: OmniConfig) -> None:
        """Takes a new policy, new queue limits, timeouts and prompt cache budget in flight; nobody admitted is lost.

        A shorter queue or fewer running requests act as places become free. Stages, and what was planned for at load,
        cannot change: ConfigError.
        """
        config.validate()
        config = config if self._graph is None else self._graph.without_idle(config)
        check_update(self._config, config, self._graph is not None, self._requests.unfinished())
        policy = make_policy(config.scheduler)
        if config.dit_cache.prompt_embeds_mb != self._config.dit_cache.prompt_embeds_mb:
            self._prompts = PromptCache(config.dit_cache.prompt_embeds_mb)
        self._policy, self._config = policy, config

    def check_integrity(self) -> None:
        """Raises an OmniError when a request is in two places, a count is wrong or something is held in vain."""
        self._requests.check_integrity()
        self._prompts.check_integrity()

    def _start_waiting(self, now: float) -> None:
        if len(self._requests.running) >= self._config.scheduler.max_running:
            return
        startable = {key: state for key, state in self._requests.waiting.items() if state.plan.stages}
        while startable and len(self._requests.running) < self._config.scheduler.max_running:
            request_id, error = self._pick(startable, now)
            del startable[request_id]
            if error is None:
                self._requests.start(request_id)
            else:
                self.fail(request_id, error)

    def _pick(self, startable: Mapping[str, RequestState], now: float) -> tuple[str, SchedulerError | None]:
        """The request that starts next. Where the policy cannot say, the oldest one, and the error that ends it."""
        try:
            picked = self._policy.pick(startable.values(), now)
            if startable.get(picked.request.request_id) is picked:
                return picked.request.request_id, None
            why = "picked what does not wait"
        except Exception as error:
            why = f"raised {type(error).__name__}: {error}"
        oldest = min(startable.values(), key=lambda state: state.order)
        name = str.__str__(self._config.scheduler.policy)
        return oldest.request.request_id, SchedulerError(f"scheduling policy {name!r} {why}")

    def _launch(self, state: RequestState, stage: str, now: float) -> list[StageTask]:
        """The task of a ready stage; none when the cache answers for it or its key cannot be made. What streams is not
        cached: its inputs are not complete yet, or its rows are not kept.
        """
        plan = state.plan.stages[stage]
        inputs = state.launch(stage, now)
        asked = state.request if plan.asked is None else plan.asked
        given = (plan.prepared, plan.saved, plan.job_size, plan.prefixes)
        task = StageTask(asked, stage, plan.seeded_params, inputs, *given)
        try:
            key = None if state.streams.touches(stage) else plan.cache_key(task)
        except OmniError as error:
            state.drop(stage)
            self.fail(state.request.request_id, error)
            return []
        if key is not None and not state.is_again:  # else what is kept may be what was lost
            kept = self._prompts.get(stage, key, state.request.request_id)
            if kept is not None:
                self._complete(state, stage, *kept, now)
                return []
        if key is not None:
            state.cache_keys[stage] = key
        return [task]

    def _stream(self, state: RequestState, now: float) -> list[Order]:
        """Hands chunks to running readers, holds back writers that are too far ahead of them, lets others go on."""
        request_id, streams = state.request.request_id, state.streams
        orders: list[Order] = []
        if streams.is_empty and not state.is_caller_behind and not state.dropped_readers:
            return orders
        for edge, rows in streams.hand_over(state.running):
            orders.append(Feed(request_id, edge.target, edge.target_port, rows))
        to_pause, to_resume = streams.change_pauses(state.running, self._too_fast(state))
        orders += [Pause(request_id, stage) for stage in sorted(to_pause)]
        orders += [Resume(request_id, stage) for stage in sorted(to_resume)]
        orders += [Skip(request_id, stage) for stage in state.dropped_readers]
        state.dropped_readers.clear()
        late = streams.overdue(state.running, self._held_back, now)
        if late is not None:
            self._requests.counts["timed_out"] += 1
            self.fail(request_id, late)
        return orders

    def _too_fast(self, state: RequestState) -> set[str]:
        """The running stages that write words or rows for a caller who is behind; not those with one whole result."""
        if not state.is_caller_behind or self._graph is None:
            return set()
        signatures = {stage: self._graph.signatures[stage] for stage in state.plan.outputs if stage in state.running}
        return {name for name, ports in signatures.items() if ports.results & ({"text"} | ports.streamed_outputs)}

    def _complete(
        self, state: RequestState, stage: str, payload: StagePayload, metrics: Mapping[str, Any], now: float
    ) -> None:
        request_id = state.request.request_id
        try:
            state.complete(stage, payload, metrics, now)
        except OmniError as error:
            self.fail(request_id, error)
            return
        if state.is_done:
            self._requests.end(request_id, RequestStatus.FINISHED, None)

    def _time_out(self, state: RequestState) -> None:
        request_id, limit_s = state.request.request_id, state.deadline_s - state.admitted_s
        where = ", ".join([*state.running, *state.ready]) if request_id in self._requests.running else "the queue"
        self._requests.counts["timed_out"] += 1
        message = f"request {request_id!r} was not done within {limit_s:g} s (it was in {where}); raise timeout_s"
        self.fail(request_id, RequestTimeoutError(message))
