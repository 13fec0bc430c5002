"""The one loop: requests in, stages stepped in turn, outputs out.

Omni steps it in the caller's thread, AsyncOmni in its own. Owns the scheduler, the stages
and their models. Not thread-safe: one caller at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm_omni import registry
from vllm_omni.config.graph import StageGraph
from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.core.routing.orders import Feed, Launch, Order, Pause
from vllm_omni.engine.base import (
    EngineContext,
    StageDone,
    StageEngine,
    StageEvent,
    StageFailed,
    StageProgress,
    StageRows,
    StageTask,
    StageTook,
)
from vllm_omni.engine.boundary import stage_boundary
from vllm_omni.engine.output import PartialOutputs, make_output
from vllm_omni.errors import OmniError, SchedulerError, StageError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.executor.memory import plan_memory, reserve_memory
from vllm_omni.executor.planner import RequestPlanner
from vllm_omni.executor.stage_host import StageHost
from vllm_omni.request import OmniOutput, OmniRequest
from vllm_omni.utils.device import resolve_device, resolve_dtype
from vllm_omni.worker.model_pool import ModelPool


class OmniExecutor:
    """Loads every stage that a config's outputs call for and runs requests through them.

    Constructing checks the memory plan before any weights load (ResourceError), and leaves nothing behind when a stage
    cannot load. clock: seconds, monotonic.
    """

    def __init__(self, config: OmniConfig, graph: StageGraph, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._graph = graph
        config = graph.without_idle(config)
        self._scheduler = OmniScheduler(config, graph)
        self._memory = reserve_memory(config, plan_memory(config))
        self._models = ModelPool()
        self._hosts: dict[str, StageHost] = {}
        self._outputs: list[OmniOutput] = []
        self._partials: dict[str, PartialOutputs] = {}
        try:
            for name in graph.order:
                self._hosts[name] = self._load(config, config.stages[name])
        except BaseException:
            self.shutdown()
            raise
        self._planner = RequestPlanner(graph, self._hosts)
        self._scheduler.start()

    def add_request(self, request: OmniRequest, *, stream: bool = False) -> None:
        """Takes a request; its one final output comes from a later `step`, REJECTED where it could never run.

        stream: whether partial outputs come before it. Raises QueueFullError when too many wait, and SchedulerError for
        an id in use or when stopped; then nothing has been taken and no output follows.
        """
        self._scheduler.ensure_accepts(request.request_id)
        now = self._clock()
        try:
            plan = self._planner.plan(request)
            self._scheduler.schedule(request, plan, now=now)
        except OmniError as error:
            self._scheduler.reject(request, error)
            return
        if stream:
            self._partials[request.request_id] = PartialOutputs(self._graph.outputs)

    def abort(self, request_id: str) -> None:
        """Ends a request at once; its final output is the next `take_outputs`'. Unknown or finished ones are fine."""
        self._scheduler.abort(request_id)
        self._settle()

    def step(self) -> list[OmniOutput]:
        """One step of every stage that has work and is not held back: the outputs that this made, partial and final."""
        held_back = self._scheduler.hold_back([name for name, host in self._hosts.items() if host.has_work()])
        for name, host in self._hosts.items():
            self._carry_out_orders()
            self._settle()
            if name in held_back:
                host.hold()
                continue
            for event in host.poll(self._clock, self._scheduler.get_config().worker_timeout):
                self._take(name, event)
        self._carry_out_orders()
        return self.take_outputs()

    def take_outputs(self) -> list[OmniOutput]:
        """Outputs that are ready without a step, as after `abort` and `shutdown`."""
        self._settle()
        outputs, self._outputs = self._outputs, []
        return outputs

    def has_work(self) -> bool:
        """Whether `step` or `take_outputs` will still give something."""
        return self._scheduler.has_work or bool(self._outputs)

    def stop(self) -> None:
        """Drains: takes no more requests; `step` brings the admitted ones to their ends."""
        self._scheduler.stop()

    def shutdown(self) -> None:
        """At once: unfinished requests end ABORTED (see `take_outputs`), all stages are freed. May be called twice."""
        self._scheduler.shutdown()
        self._settle()
        for host in self._hosts.values():
            host.executor.shutdown()
        self._models.clear()

    @property
    def scheduler(self) -> OmniScheduler:
        return self._scheduler

    def get_status(self) -> dict[str, Any]:
        """The scheduler's gauges and, by stage, its tasks and whether it is alive; safe to call from another thread."""
        stages = {
            name: {"tasks": len(host.tasks), "alive": host.cause_of_death is None} for name, host in self._hosts.items()
        }
        return {**self._scheduler.get_status(), "stages": stages}

    def get_metrics(self) -> dict[str, Any]:
        """The scheduler's counters, by stage the engine's own, planned memory in bytes, how many models are loaded."""
        stages: dict[str, Any] = {}
        for name, host in self._hosts.items():
            with stage_boundary(name):
                stages[name] = host.executor.get_stats()
        memory = {"planned_bytes": dict(self._memory.shares), "limit_bytes": self._memory.limit_bytes}
        counts = self._scheduler.get_metrics()
        return {**counts, "stages": stages, "memory": memory, "num_models": len(self._models)}

    def check_integrity(self) -> None:
        """Raises an OmniError when scheduler and stages disagree, or one of them finds its own state broken."""
        self._scheduler.check_integrity()
        self._memory.check_integrity()
        held = {(request_id, name) for name, host in self._hosts.items() for request_id in host.tasks}
        if held != self._scheduler.in_flight():
            raise SchedulerError(
                f"stages hold {sorted(held)}, the scheduler says {sorted(self._scheduler.in_flight())}"
            )
        for host in self._hosts.values():
            host.check_integrity()

    def _load(self, config: OmniConfig, stage: StageConfig) -> StageHost:
        engine_class: type[StageEngine] = registry.resolve("stage kind", stage.kind)
        device = resolve_device(stage.device)
        context = EngineContext(
            config=config,
            device=device,
            dtype=resolve_dtype(stage.dtype, device),
            models=self._models,
            wanted=self._graph.wanted_ports(stage.name),
            streamed=self._graph.streamed_ports(stage.name),
        )
        executor: StageExecutor = registry.resolve("executor", stage.executor)(engine_class, stage, context)
        try:
            with stage_boundary(stage.name):
                executor.start()
        except BaseException:
            executor.shutdown()
            raise
        return StageHost(stage, engine_class, executor)

    def _carry_out_orders(self) -> None:
        for order in self._scheduler.tick(self._clock()):
            request_id = order.request.request_id if isinstance(order, Launch) else order.request_id
            try:
                self._carry_out(order)
            except StageError as error:
                self._scheduler.stage_failed(request_id, order.stage, error)

    def _carry_out(self, order: Order) -> None:
        host = self._hosts[order.stage]
        if isinstance(order, Launch):
            host.submit(StageTask(order.request, order.stage, order.params, order.inputs))
        elif isinstance(order, Feed):
            host.feed(order.request_id, order.port, order.chunk)
        elif isinstance(order, Pause):
            host.pause(order.request_id)
        else:
            host.resume(order.request_id)

    def _take(self, stage: str, event: StageEvent) -> None:
        now = self._clock()
        if isinstance(event, StageDone):
            self._scheduler.stage_done(event.request_id, stage, event.payload, event.metrics, now)
        elif isinstance(event, StageFailed):
            self._scheduler.stage_failed(event.request_id, stage, event.error)
        elif isinstance(event, StageTook):
            self._scheduler.stage_took(event.request_id, stage, event.port, now)
        else:
            if isinstance(event, StageRows):
                self._take_rows(stage, event, now)
            self._add_partial(stage, event)

    def _take_rows(self, stage: str, event: StageRows, now: float) -> None:
        streamed = self._graph.signatures[stage].streamed_outputs
        if event.port in streamed:
            self._scheduler.stage_rows(event.request_id, stage, event.port, event.rows, event.is_last, now)
        else:
            words = f"stage {stage!r} gave rows of {event.port!r}, expected one of {sorted(streamed)}"
            self._scheduler.fail(event.request_id, StageError(words))

    def _add_partial(self, stage: str, event: StageProgress | StageRows) -> None:
        """Hands the caller what is new, where the request streams; what cannot be shown ends it."""
        partials = self._partials.get(event.request_id)
        try:
            with stage_boundary(stage):
                partial = None if partials is None else partials.make(event, stage)
        except OmniError as error:
            self._scheduler.fail(event.request_id, error)
            return
        if partial is not None:
            self._outputs.append(partial)

    def _settle(self) -> None:
        """Turns every end into its output, and makes the stages that still work on it forget it."""
        for end in self._scheduler.take_ends():
            for stage in end.abandoned:
                self._hosts[stage].abort(end.request.request_id)
            self._partials.pop(end.request.request_id, None)
            self._outputs.append(make_output(end, self._graph.outputs))
