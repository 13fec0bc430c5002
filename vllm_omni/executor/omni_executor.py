"""The one loop: requests in, stages stepped in turn, outputs out.

Omni steps it in the caller's thread, AsyncOmni in its own. Owns the scheduler, the stages and their models. Not
thread-safe, but for `plan` and `wake`: one caller at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.core.routing.request_plan import RequestPlan
from vllm_omni.core.routing.request_state import RequestPosition
from vllm_omni.engine.base import MemoryPlan
from vllm_omni.engine.boundary import stage_boundary
from vllm_omni.errors import ConfigError, InvalidRequestError, OmniError, SchedulerError
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.dispatch import Dispatch
from vllm_omni.executor.loading_step import LoadingStep, OnLoading, announce
from vllm_omni.executor.memory import plan_memory, reserve_memory
from vllm_omni.executor.open_text import OpenTexts
from vllm_omni.executor.outbox import Outbox
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.planner import RequestPlanner
from vllm_omni.executor.replica_set import ReplicaSet
from vllm_omni.executor.saving import resumable
from vllm_omni.executor.stage_builder import StageBuilder
from vllm_omni.request import OmniOutput, OmniRequest
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.device import set_threads
from vllm_omni.worker.background import Background

MAX_WAIT_S = 0.05
LOOK_S = 0.25  # between two looks at other processes while nothing is done: one that is stopped wakes nobody


class OmniExecutor:
    """Loads every stage of a pipeline and runs requests through them.

    Constructing checks the memory plan before any weights load (ResourceError), and leaves nothing behind when a stage
    cannot load. clock: seconds, monotonic. on_loading: is called before each stage.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_loading: OnLoading | None = None,
    ) -> None:
        self._clock = clock
        self._pipeline = pipeline
        self._graph = pipeline.graph
        self._scheduler = OmniScheduler(pipeline.config, pipeline.graph)
        self._planner = RequestPlanner(pipeline)
        plans = plan_memory(pipeline)
        self._memory = reserve_memory(pipeline.config, plans)
        if pipeline.config.threads is not None:
            set_threads(pipeline.config.threads)
        self._commons = Commons()
        self._wake = self._commons.wake
        self._background = Background(self._wake)
        self._builder = StageBuilder(pipeline, self._background, self._commons)
        self._stages: dict[str, ReplicaSet] = {}
        self._outbox = Outbox()
        self._dispatch = Dispatch(pipeline.graph, self._scheduler, self._stages, self._outbox)
        self._texts = OpenTexts(self._scheduler, self._stages)
        self._step_started: float | None = None
        try:
            for name in pipeline.specs:
                self._load(name, plans[name], on_loading)
            for name, stage in self._stages.items():
                if stage.is_apart:
                    pipeline.specs[name].warm_up()
            for stage in self._stages.values():
                stage.ensure_loaded()
        except BaseException:
            self.shutdown()
            raise
        self._scheduler.start()

    def plan(self, request: OmniRequest) -> RequestPlan | OmniError:
        """What a request asks of the stages, or why it could never run. From any thread: prompts are tokenised here,
        and headers of media read.
        """
        return self._planner.plan_or_error(request)

    def add_request(
        self,
        request: OmniRequest,
        plan: RequestPlan | OmniError | None = None,
        *,
        stream: bool = False,
        steps: bool = True,
    ) -> None:
        """Takes a request; its one final output comes from a later `step`, REJECTED where it could never run.

        plan: of `plan`, where that was called before. stream: whether partial outputs come before the final one.
        steps: whether there is one for a step that made nothing to show. Raises QueueFullError when too many wait, and
        SchedulerError for an id in use or when stopped; then nothing has been taken and no output follows.
        """
        self._scheduler.ensure_accepts(request.request_id)
        now = self._clock()
        plan = self.plan(request) if plan is None else plan
        try:
            if isinstance(plan, OmniError):
                raise plan
            for name in plan.stages:
                self._stages[name].mend(self._scheduler.get_config().worker_timeout)
                self._stages[name].ensure_ready()
            self._scheduler.schedule(request, plan, now=now)
        except OmniError as error:
            self._scheduler.reject(request, error)
            return
        if stream:
            self._outbox.watch(request.request_id, plan.outputs, steps)
        if request.is_open:
            self._texts.open(request.request_id, plan)

    def extend(self, request_id: str, piece: str, is_last: bool) -> None:
        """More of the text of a request that is open (`OmniRequest.is_open`). What is wrong with the text ends the
        request; nothing for one that has ended.
        """
        try:
            self._texts.extend(request_id, piece, is_last, self._clock())
        except OmniError as error:
            self.fail(request_id, error)

    def fail(self, request_id: str, error: OmniError) -> None:
        """Ends a request FAILED, as where its text cannot go on; otherwise as `abort`."""
        self._scheduler.fail(request_id, error)
        self._finish_ended()

    def abort(self, request_id: str) -> None:
        """Ends a request at once; its final output is the next `take_outputs`'. Unknown or finished ones are fine."""
        self._scheduler.abort(request_id)
        self._finish_ended()

    def save_state(self, request_id: str) -> OmniRequest:
        """A request that goes on from where this one is, in this process or another; this one goes on as well.
        InvalidRequestError where it does not run, or nothing of it can be saved now.
        """
        found = self._scheduler.running_plan(request_id)
        if found is None:
            raise InvalidRequestError(f"request_id: got {brief(request_id)}, expected that of a request that runs")
        saved = resumable(*found, self._pipeline, self._stages)
        self._planner.plan(saved)  # which says now what could not go on later
        return saved

    def set_caller_behind(self, request_id: str, is_behind: bool) -> None:
        """Holds the writers of a stream back while its partial outputs pile up unread."""
        self._scheduler.set_caller_behind(request_id, is_behind)

    def step(self) -> list[OmniOutput]:
        """One step of every stage that has work and is not held back: the outputs that this made, partial and final.
        Stages that are broken are rebuilt here, each when its time has come.
        """
        self._step_started = self._clock()
        try:
            self._step()
        finally:
            self._step_started = None
        return self.take_outputs()

    def wait(self) -> None:
        """Sleeps while no stage could do anything, until something wakes it, but not for long: deadlines pass. Returns
        at once when a step would do something.
        """
        is_waiting = self.has_work() or self.is_mending
        if is_waiting and not self._outbox and not any(stage.is_busy() for stage in self._stages.values()):
            self._wake.wait(MAX_WAIT_S)

    def wake(self) -> None:
        """Ends a `wait`. From any thread."""
        self._wake()

    def listen(self, listener: Callable[[], None]) -> None:
        """listener: is called, from any thread, whenever a `wait` would end: a stage may have to be rebuilt though
        nobody waits.
        """
        self._wake.listen(listener)

    def take_outputs(self) -> list[OmniOutput]:
        """Outputs that are ready without a step, as after `abort` and `shutdown`."""
        self._finish_ended()
        return self._outbox.take()

    @property
    def step_started(self) -> float | None:
        """When the step that is under way began, on the clock; None between two. From any thread, without a lock."""
        return self._step_started

    @property
    def is_mending(self) -> bool:
        """Whether a stage is being rebuilt, or may soon have to be: then `step` has something to do now and then, also
        without a request.
        """
        return any(stage.is_mending for stage in self._stages.values())

    @property
    def rest_s(self) -> float | None:
        """How long to sleep without work before `is_mending` is asked again; None: until something wakes."""
        return LOOK_S if any(stage.is_apart for stage in self._stages.values()) else None

    def has_work(self) -> bool:
        """Whether `step` or `take_outputs` will still give something."""
        return self._scheduler.has_work or bool(self._outbox)

    def stop(self) -> None:
        """Drains: takes no more requests; `step` brings the admitted ones to their ends."""
        self._scheduler.stop()

    def restart_stage(self, name: str) -> None:
        """Begins to restart the replicas of a stage one after another, each once its tasks have finished: no request
        is lost, and none refused. `step` goes on with it, `get_status` says how far it is. ConfigError for a stage that
        is not there.
        """
        if name not in self._stages:
            raise ConfigError(f"stage: got {name!r:.80}{did_you_mean(str(name), self._stages)}")
        self._stages[name].restart()

    def shutdown(self) -> None:
        """At once: unfinished requests end ABORTED (see `take_outputs`), all stages are freed. May be called twice."""
        self._scheduler.shutdown()
        self._finish_ended()
        for stage in self._stages.values():
            stage.shutdown()
        for spec in self._pipeline.specs.values():
            spec.close()
        self._background.shutdown()
        self._builder.models.clear()
        self._commons.close()

    @property
    def pipeline(self) -> Pipeline:
        """What runs: config, graph and the specs of its stages."""
        return self._pipeline

    @property
    def scheduler(self) -> OmniScheduler:
        return self._scheduler

    def find(self, request_id: str) -> RequestPosition | None:
        """Where an unfinished request is; safe to call from another thread."""
        position = self._scheduler.find(request_id)
        return None if position is None else replace(position, progress=self._outbox.progress(request_id))

    def get_status(self) -> dict[str, Any]:
        """The scheduler's gauges, `step_s` (seconds inside the step that is under way; 0 between two) and, by stage,
        what `ReplicaSet.get_status` says; safe to call from another thread.
        """
        started_s, timeout_s = self._step_started, self._scheduler.get_config().worker_timeout
        step_s = 0.0 if started_s is None else self._clock() - started_s
        stages = {name: stage.get_status(timeout_s) for name, stage in self._stages.items()}
        return {**self._scheduler.get_status(), "step_s": step_s, "stages": stages}

    def get_metrics(self) -> dict[str, Any]:
        """The scheduler's counters, what went over every edge, by stage the engine's own counters, its dtype and why it
        has that, planned memory in bytes, how many models are loaded, in all processes.
        """
        stages: dict[str, Any] = {}
        for name, stage in self._stages.items():
            with stage_boundary(name):
                stages[name] = stage.get_stats()
        memory = {"planned_bytes": dict(self._memory.shares), "limit_bytes": self._memory.limit_bytes}
        counts = self._scheduler.get_metrics()
        chosen = {name: spec.precision for name, spec in self._pipeline.specs.items()}
        return {
            **counts,
            "edges": self._dispatch.traffic.get_stats(),
            "stages": stages,
            "dtypes": {name: {"dtype": one.name, "reason": one.reason} for name, one in chosen.items()},
            "memory": memory,
            "num_models": len(self._builder.models) + sum(stage.num_models for stage in self._stages.values()),
        }

    def check_integrity(self) -> None:
        """Raises an OmniError when scheduler and stages disagree, or one of them finds its own state broken."""
        self._scheduler.check_integrity()
        self._memory.check_integrity()
        held = {(request_id, name) for name, stage in self._stages.items() for request_id in stage.tasks}
        if held != self._scheduler.in_flight():
            raise SchedulerError(
                f"stages hold {sorted(held)}, the scheduler says {sorted(self._scheduler.in_flight())}"
            )
        self._outbox.check_integrity(self._scheduler.is_unfinished)
        for stage in self._stages.values():
            stage.check_integrity()

    def _step(self) -> None:
        busy = [name for name, stage in self._stages.items() if stage.is_busy()]
        held_back = self._scheduler.hold_back(busy, self._builder.devices)
        for name, stage in self._stages.items():
            self._dispatch.carry_out_orders(self._clock())
            self._finish_ended()
            if name in held_back:
                stage.hold()
                continue
            timeout_s = self._scheduler.get_config().worker_timeout
            stage.mend(timeout_s)
            for event in stage.poll(timeout_s, partial(self._scheduler.is_waiting, stage=name)):
                self._dispatch.receive(name, event, self._clock())
        self._dispatch.carry_out_orders(self._clock())
        for stage in self._stages.values():
            stage.compact_rows()

    def _load(self, name: str, plan: MemoryPlan, on_loading: OnLoading | None) -> None:
        """Begins to: stages that load elsewhere do so at the same time."""
        spec, context = self._pipeline.specs[name], self._builder.context(name)
        announce(LoadingStep.of(spec, context, plan.weights_bytes), on_loading)
        streamed = {edge.source_port for edge in self._graph.edges_from(name) if edge.stream is not None}
        signature = self._graph.signatures[name]
        inputs = {**signature.inputs, **signature.text_inputs}
        build = partial(self._builder.build, name)
        self._stages[name] = ReplicaSet(name, spec.stage.replicas, build, inputs, streamed, self._clock)
        self._stages[name].load()

    def _finish_ended(self) -> None:
        """Turns every end into its output, and makes the stages drop what they hold of the request."""
        for end in self._scheduler.take_ends():
            self._outbox.end(end, lambda stage, request_id: self._stages[stage].partial_result(request_id))
            for stage in self._stages.values():
                stage.abort(end.request.request_id)
            self._texts.close(end.request.request_id)
