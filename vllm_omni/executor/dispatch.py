"""Between the scheduler and the stages of one loop: carries the scheduler's orders to the stages, and takes what these
report back to it, to the readers of streamed rows and to callers. Decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.engine.boundary import as_stage_error
from vllm_omni.errors import DataLostError, OmniError, StageError
from vllm_omni.executor.edge_traffic import EdgeTraffic
from vllm_omni.executor.outbox import Outbox
from vllm_omni.executor.replica_set import ReplicaSet
from vllm_omni.messages import (
    ChunkConsumed,
    Feed,
    Order,
    Pause,
    Resume,
    StageDone,
    StageEvent,
    StageFailed,
    StageProgress,
    StageRows,
    StageTask,
)
from vllm_omni.utils.checks import check_number

logger = logging.getLogger(__name__)


class Dispatch:
    """Of the stages of a graph, which the caller may add to. What goes wrong over an order or an event ends its
    request alone.
    """

    def __init__(
        self, graph: StageGraph, scheduler: OmniScheduler, stages: Mapping[str, ReplicaSet], outbox: Outbox
    ) -> None:
        self.traffic = EdgeTraffic()
        self._graph = graph
        self._scheduler = scheduler
        self._stages = stages
        self._outbox = outbox

    def carry_out_orders(self, now: float) -> None:
        """All that the scheduler wants done by now."""
        for order in self._scheduler.tick(now):
            try:
                self._carry_out(order)
            except Exception as error:
                self._scheduler.stage_failed(order.request_id, order.stage, as_stage_error(order.stage, error))

    def receive(self, stage: str, event: StageEvent, now: float) -> None:
        """Something that a stage has reported."""
        try:
            self._receive(stage, event, now)
        except Exception as error:  # what the event holds is not what it should be
            self._scheduler.fail(event.request_id, as_stage_error(stage, error))

    def _carry_out(self, order: Order) -> None:
        stage = self._stages[order.stage]
        if isinstance(order, StageTask):
            is_watched = self._outbox.is_watched(order.request_id)
            self.traffic.count_inputs(self._graph.edges_into(order.stage), stage.submit(order, is_watched))
        elif isinstance(order, Feed):
            chunk = stage.feed(order.request_id, order.port, order.rows)
            if chunk is not None:
                self.traffic.count_inputs(self._graph.edges_into(order.stage), {order.port: chunk})
        elif isinstance(order, Pause):
            stage.pause(order.request_id)
        elif isinstance(order, Resume):
            stage.resume(order.request_id)
        else:
            stage.abort(order.request_id)

    def _receive(self, stage: str, event: StageEvent, now: float) -> None:
        if isinstance(event, StageDone):
            _check_metrics(stage, event.metrics)
            self._scheduler.stage_done(event.request_id, stage, event.payload, event.metrics, now)
            if self._scheduler.is_unfinished(event.request_id):  # else the final output says it at once
                self._add_partial(stage, event)
        elif isinstance(event, StageFailed):
            if not (is_data_lost(event.error) and self._run_again(event.request_id, event.error, now)):
                self._scheduler.stage_failed(event.request_id, stage, event.error, event.made)
        elif isinstance(event, ChunkConsumed):
            self._scheduler.chunk_consumed(event.request_id, stage, event.port, now)
        elif isinstance(event, StageProgress | StageRows):
            if isinstance(event, StageRows):
                self._receive_rows(stage, event, now)
            self._add_partial(stage, event)

    def _run_again(self, request_id: str, why: OmniError, now: float) -> bool:
        """What a stage has made is gone with its machine, and so perhaps what that was made of: all stages run again,
        where no caller has seen a part of what they made.
        """
        if self._outbox.has_shown(request_id) or not self._scheduler.run_again(request_id, now):
            return False
        logger.warning("request %r is run again from its first stage: %s", request_id, why)
        for stage in self._stages.values():
            stage.abort(request_id)
        return True

    def _receive_rows(self, stage: str, event: StageRows, now: float) -> None:
        """The scheduler counts the rows, the readers keep them."""
        streamed = self._graph.signatures[stage].streamed_outputs
        if event.port not in streamed:
            words = f"stage {stage!r} gave rows of {event.port!r}, expected one of {sorted(streamed)}"
            self._scheduler.fail(event.request_id, StageError(words))
            return
        num_rows = len(event.rows) if event.rows.dim() else 0
        for edge in self._scheduler.rows_made(event.request_id, stage, event.port, num_rows, event.is_last, now):
            self._keep_rows(edge, event)

    def _keep_rows(self, edge: Edge, event: StageRows) -> None:
        try:
            self._stages[edge.target].keep_rows(event.request_id, edge.target_port, event.rows)
        except StageError as error:
            self._scheduler.fail(event.request_id, StageError(f"{edge}: {error}"))

    def _add_partial(self, stage: str, event: StageProgress | StageRows | StageDone) -> None:
        """Where the request streams; what cannot be shown ends it."""
        try:
            self._outbox.add_partial(stage, event)
        except OmniError as error:
            self._scheduler.fail(event.request_id, error)


def is_data_lost(error: BaseException | None) -> bool:
    """Whether a DataLostError is what an error comes from."""
    while error is not None:
        if isinstance(error, DataLostError):
            return True
        error = error.__cause__
    return False


def _check_metrics(stage: str, metrics: Mapping[str, Any]) -> None:
    """Whoever counts them would fail on anything but a number; a list holds several."""
    for name, value in metrics.items():
        for number in value if isinstance(value, list) else [value]:
            check_number(f"stage {stage!r}: metrics[{name!r}]", number, 0, raises=StageError)
