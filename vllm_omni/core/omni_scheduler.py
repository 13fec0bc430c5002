"""Admission, order and routing of requests through the stages: a pure state machine.

Time is an argument, nothing runs by itself and no engine is known: `tick` says which stages to launch, `stage_done`
and `stage_failed` tell what became of them, and `take_ends` gives every request's one and only end.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm_omni.config.graph import StageGraph
from vllm_omni.config.schema import OmniConfig
from vllm_omni.core.dit_cache_manager import DiTCacheManager
from vllm_omni.core.policies import make_policy
from vllm_omni.core.request_state import Launch, RequestEnd, RequestPlan, RequestState, default_plan
from vllm_omni.core.resources import MIB
from vllm_omni.errors import (
    ConfigError,
    OmniError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    SchedulerError,
)
from vllm_omni.payload import StagePayload
from vllm_omni.request import OmniRequest, RequestStatus
from vllm_omni.utils.checks import did_you_mean

CHANGEABLE = frozenset({"scheduler", "dit_cache", "request_timeout", "worker_timeout"})


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
        self._embeddings = DiTCacheManager(max_bytes=int(config.dit_cache.prompt_embeds_mb * MIB))
        self._is_started = False
        self._is_stopped = False
        self._num_admitted = 0
        self._waiting: dict[str, RequestState] = {}
        self._running: dict[str, RequestState] = {}
        self._ends: dict[str, RequestEnd] = {}
        self._counts: Counter[str] = Counter()

    def start(self) -> None:
        """Accepts requests, also again after `stop`; may be called twice."""
        self._is_started, self._is_stopped = True, False

    def stop(self) -> None:
        """Drains: admits nothing more, whatever was admitted goes on to its end."""
        self._is_started, self._is_stopped = False, True

    def shutdown(self) -> None:
        """At once: admits nothing more, everything unfinished ends ABORTED."""
        self.stop()
        for request_id in [*self._waiting, *self._running]:
            self._end(request_id, RequestStatus.ABORTED, RequestAbortedError("the scheduler was shut down"))

    def ensure_accepts(self, request_id: str) -> None:
        """Raises SchedulerError when stopped or when the id is in use, QueueFullError when too many wait."""
        if self._is_stopped:
            raise SchedulerError(f"request {request_id!r}: the scheduler is stopped; call start() or make a new one")
        self._ensure_unused(request_id)
        limit = self._config.scheduler.max_queue_size
        if len(self._waiting) >= limit:
            raise QueueFullError(
                f"{len(self._waiting)} requests wait; retry later or raise scheduler.max_queue_size ({limit})"
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
        state = RequestState(request, plan or default_plan(self._graph), self._num_admitted, now, timeout_s)
        self._num_admitted += 1
        self._waiting[request.request_id] = state
        return True

    def reject(self, request: OmniRequest, error: OmniError) -> None:
        """Ends a request that was never admitted; SchedulerError when its id is in use."""
        self._ensure_unused(request.request_id)
        self._counts[RequestStatus.REJECTED.value] += 1
        self._ends[request.request_id] = RequestEnd(request, RequestStatus.REJECTED, error=error)

    def abort(self, request_id: str) -> None:
        """Ends a request ABORTED; an unknown or finished one is left alone."""
        self._end(request_id, RequestStatus.ABORTED, RequestAbortedError(f"request {request_id!r} was aborted"))

    def fail(self, request_id: str, error: OmniError) -> None:
        """Ends a request FAILED; an unknown or finished one is left alone."""
        self._end(request_id, RequestStatus.FAILED, error)

    def tick(self, now: float) -> list[Launch]:
        """Ends what is overdue, starts waiting requests up to `max_running`, launches what has complete inputs."""
        for state in [*self._waiting.values(), *self._running.values()]:
            if now >= state.deadline_s:
                self._time_out(state)
        self._start_waiting(now)
        launches: list[Launch] = []
        for request_id, state in list(self._running.items()):
            while state.ready and request_id in self._running:
                launches += self._launch(state, next(iter(state.ready)), now)
            if state.is_stalled:
                missing = ", ".join(state.missing)
                self.fail(request_id, SchedulerError(f"nothing runs that could feed the stages {missing}"))
        return launches

    def stage_done(
        self, request_id: str, stage: str, payload: StagePayload, metrics: Mapping[str, Any], now: float
    ) -> None:
        """Takes a launched stage's payload. Late news (the request ended, the stage does not run) is dropped."""
        state = self._working_on(request_id, stage)
        if state is None:
            return
        key = state.cache_keys.pop(stage, None)
        if key is not None:
            num_bytes = payload.num_bytes + len(key) + len(repr(payload.meta))  # words alone take memory too
            self._embeddings.set_cache((stage, key), payload, num_bytes)
        self._complete(state, stage, payload, metrics, now)

    def stage_failed(self, request_id: str, stage: str, error: OmniError) -> None:
        """A launched stage gave up: the request ends FAILED with this error. Late news is dropped."""
        state = self._working_on(request_id, stage)
        if state is None:
            return
        state.drop(stage)
        self.fail(request_id, error)

    def take_ends(self) -> list[RequestEnd]:
        """Every end since the last call, in order; each request has exactly one. Its id is free again."""
        ends = list(self._ends.values())
        self._ends.clear()
        return ends

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, or its end has not been taken."""
        return bool(self._waiting or self._running or self._ends)

    def in_flight(self) -> set[tuple[str, str]]:
        """(request id, stage) of every launched stage that is still to end."""
        return {(request_id, stage) for request_id, state in self._running.items() for stage in state.running}

    def get_status(self) -> dict[str, Any]:
        """Gauges; safe to call from another thread."""
        return {
            "running": self._is_started,
            "accepting": not self._is_stopped,
            "queue_size": len(self._waiting),
            "running_requests": len(self._running),
            "processed_requests": self._counts["processed"],
            "cache_hit_rate": self._embeddings.get_hit_rate(),
            "policy": str.__str__(self._config.scheduler.policy),
            "max_queue_size": self._config.scheduler.max_queue_size,
            "max_running": self._config.scheduler.max_running,
        }

    def get_metrics(self) -> dict[str, Any]:
        """Counters since construction: admitted, ends by status, timeouts, stray events, the prompt-embedding cache."""
        ends = {status.value: self._counts[status.value] for status in RequestStatus if status.is_final}
        return {
            "admitted": self._num_admitted,
            **ends,
            "timed_out": self._counts["timed_out"],
            "stray_events": self._counts["stray_events"],
            "prompt_embeds": self._embeddings.get_stats(),
        }

    def get_config(self) -> OmniConfig:
        return self._config

    def update_config(self, config: OmniConfig) -> None:
        """Takes a new policy, new queue limits, timeouts and prompt cache budget in flight; nobody admitted is lost.

        A shorter queue or fewer running requests act as places become free. Stages, and what was planned for at load,
        cannot change: ConfigError.
        """
        config.validate()
        self._check_update(config)
        policy = make_policy(config.scheduler)
        if config.dit_cache.prompt_embeds_mb != self._config.dit_cache.prompt_embeds_mb:
            self._embeddings = DiTCacheManager(max_bytes=int(config.dit_cache.prompt_embeds_mb * MIB))
        self._policy, self._config = policy, config

    def check_integrity(self) -> None:
        """Raises an OmniError when a request is in two places, a count is wrong or something is held in vain."""
        admitted_ends = [key for key, end in self._ends.items() if end.status is not RequestStatus.REJECTED]
        places = [*self._waiting, *self._running, *admitted_ends]
        if len(places) != len(set(places)):
            raise SchedulerError(f"a request is in two places: {sorted(places)}")
        unfinished = len(self._waiting) + len(self._running)
        if self._num_admitted != unfinished + self._counts["processed"]:
            raise SchedulerError(
                f"{self._num_admitted} admitted, {unfinished} unfinished, {self._counts['processed']} ended"
            )
        for state in [*self._waiting.values(), *self._running.values()]:
            state.check_integrity()
        if any(state.running or state.done for state in self._waiting.values()):
            raise SchedulerError("a waiting request has launched stages")
        self._embeddings.check_integrity()

    def _ensure_unused(self, request_id: str) -> None:
        if request_id in self._waiting or request_id in self._running or request_id in self._ends:
            raise SchedulerError(f"request_id: {request_id!r} is in use by an unfinished request; ids must be unique")

    def _check_update(self, config: OmniConfig) -> None:
        if self._graph is not None:
            for field in dataclasses.fields(OmniConfig):
                if field.name not in CHANGEABLE and getattr(config, field.name) != getattr(self._config, field.name):
                    raise ConfigError(
                        f"{field.name}: cannot change while stages are loaded; close this one and make another"
                    )
            if config.dit_cache.max_memory_mb != self._config.dit_cache.max_memory_mb:
                raise ConfigError("dit_cache.max_memory_mb: cannot change while stages are loaded")
        for state in [*self._waiting.values(), *self._running.values()]:
            if state.priority not in config.scheduler.priority_weights:
                raise ConfigError(
                    f"scheduler.priority_weights: {state.priority!r} is missing, but an unfinished request has it"
                )

    def _start_waiting(self, now: float) -> None:
        if len(self._running) >= self._config.scheduler.max_running:
            return
        startable = {key: state for key, state in self._waiting.items() if state.plan.stages}
        while startable and len(self._running) < self._config.scheduler.max_running:
            request_id = self._policy.pick(startable.values(), now).request.request_id
            del startable[request_id]
            self._running[request_id] = self._waiting.pop(request_id)

    def _launch(self, state: RequestState, stage: str, now: float) -> list[Launch]:
        """The launch of a ready stage; none when the cache answers for it or its key cannot be made."""
        plan = state.plan.stages[stage]
        inputs = state.launch(stage, now)
        try:
            key = plan.cache_key(inputs)
        except OmniError as error:
            state.drop(stage)
            self.fail(state.request.request_id, error)
            return []
        if key is not None:
            payload: StagePayload | None = self._embeddings.get_cache((stage, key))
            if payload is not None:
                mine = dataclasses.replace(payload, request_id=state.request.request_id)
                self._complete(state, stage, mine, {"cached": True, "steps": 0}, now)
                return []
            state.cache_keys[stage] = key
        return [Launch(state.request, stage, plan.params, inputs)]

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
            self._end(request_id, RequestStatus.FINISHED, None)

    def _working_on(self, request_id: str, stage: str) -> RequestState | None:
        """The request that the stage works on; None, and a stray event counted, where it does not."""
        state = self._running.get(request_id)
        if state is not None and stage in state.running:
            return state
        self._counts["stray_events"] += 1
        return None

    def _time_out(self, state: RequestState) -> None:
        request_id, limit_s = state.request.request_id, state.deadline_s - state.admitted_s
        where = ", ".join([*state.running, *state.ready]) if request_id in self._running else "the queue"
        self._counts["timed_out"] += 1
        message = f"request {request_id!r} was not done within {limit_s:g} s (it was in {where}); raise timeout_s"
        self._end(request_id, RequestStatus.FAILED, RequestTimeoutError(message))

    def _end(self, request_id: str, status: RequestStatus, error: OmniError | None) -> None:
        state = self._running.pop(request_id, None) or self._waiting.pop(request_id, None)
        if state is None:
            return
        self._counts["processed"] += 1
        self._counts[status.value] += 1
        self._ends[request_id] = state.end(status, error)
