"""The half of an executor that stands beside the loop, where a `StageServant` holds the engine elsewhere: sends orders,
takes in reports, hears nothing of tasks that were dropped. How both travel is a subclass's matter.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from vllm_omni.engine.base import Activity, EngineContext, StageSpec
from vllm_omni.errors import StageError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.orders import (
    Answer,
    Ask,
    Drop,
    FeedChunk,
    Hold,
    Question,
    Release,
    Report,
    StageOrder,
    Submit,
)
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.payload import StagePayload, StreamChunk

ANSWER_S = 0.1  # the most that the loop waits for the end of a step, to be told something
CHECK_S = 2.0  # ... to be told whether all is well
SAVE_S = 30.0  # ... to be told what a task has come to, which a step of a large model keeps waiting


class ServedExecutor(StageExecutor):
    """A subclass starts the host of the servant, sends to it (`_send`), hands over what it reported (`_receive`) and
    waits for more (`_wait_for_report`). A servant that has ended is a report with a breakdown.

    Reports may come in from any thread's call; what they change is guarded by `_lock`.
    """

    def __init__(self, spec: StageSpec, context: EngineContext, commons: Commons, blueprint: StageBlueprint) -> None:
        self._spec = spec
        self._context = context
        self._wake = commons.wake
        self._blueprint = blueprint
        self._lock = threading.RLock()
        self._num_sent = 0  # orders
        self._num_done = 0  # of them, as far as the servant has told
        self._activity = Activity.IDLE  # the engine's own, in the last report
        self._events: list[StageEvent] = []
        self._dropped: dict[str, int] = {}  # tasks that were aborted -> which order it was that the engine drops it
        self._last_drop = 0  # which order it was; it lets an engine go on whose step has raised
        self._error: Exception | None = None  # what a step raised, for the next poll
        self._breakdown: Exception | None = None
        self._question: int | None = None  # the last one that was asked, until it is answered
        self._num_questions = 0
        self._answer: Answer | None = None
        self._stats: Mapping[str, Any] = {}  # the last that were told

    @abstractmethod
    def _send(self, order: StageOrder) -> None:
        """Sends an order on its way and returns at once; StageError where it cannot be sent at all."""

    @abstractmethod
    def _receive(self) -> list[Report]:
        """The reports that have come in, without waiting."""

    @abstractmethod
    def _wait_for_report(self, timeout_s: float) -> None:
        """Returns when there may be a report, or after so long."""

    def submit(self, task: StageTask) -> None:
        self._order(Submit(task))

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        self._order(FeedChunk(request_id, port, chunk))

    def pause(self, request_id: str) -> None:
        self._order(Hold(request_id))

    def resume(self, request_id: str) -> None:
        self._order(Release(request_id))

    def abort(self, request_id: str) -> None:
        with self._lock:
            self._events = [event for event in self._events if event.request_id != request_id]
            self._order(Drop(request_id))
            self._dropped[request_id] = self._last_drop = self._num_sent

    def partial_result(self, request_id: str) -> StagePayload | None:
        try:
            found: StagePayload | None = self._ask("partial_result", request_id)
        except TimeoutError:
            return None
        return found

    def save_state(self, request_id: str) -> Mapping[str, Any] | None:
        try:
            found: Mapping[str, Any] | None = self._ask("save_state", request_id, SAVE_S)
        except TimeoutError as error:
            raise StageError(f"{error}; save again after the next step") from error
        return found

    def poll(self) -> list[StageEvent]:
        with self._lock:
            self._collect()
            error, self._error = self._error, None
            if error is not None:
                raise error
            events, self._events = self._events, []
            return events

    def activity(self) -> Activity:
        with self._lock:
            self._collect()
            if self._events or self._error is not None:
                return Activity.BUSY
            is_stepping = self._num_done < self._num_sent or self._activity is Activity.BUSY
            return Activity.STEPPING if is_stepping else self._activity

    def responds(self) -> bool:
        try:
            self._ask("is_there")
        except (TimeoutError, StageError):
            return False
        return True

    def breakdown(self) -> Exception | None:
        with self._lock:
            self._collect()
            return self._breakdown

    def get_stats(self) -> Mapping[str, Any]:
        try:
            self._stats = self._ask("get_stats")
        except (TimeoutError, StageError):
            return self._stats
        return self._stats

    def check_integrity(self) -> None:
        self._ask("check_integrity", wait_s=CHECK_S)

    def _order(self, order: StageOrder) -> None:
        with self._lock:
            self._send(order)
            self._num_sent += 1

    def _portable(self, order: StageOrder) -> StageOrder:
        """What another process is sent of an order."""
        if not isinstance(order, Submit):
            return order
        return order.for_another_process(self._spec.portable(order.task.prepared))

    def _collect(self) -> None:
        for report in self._receive():
            self._take_in(report)

    def _take_in(self, report: Report) -> None:
        self._num_done = max(self._num_done, report.num_orders)
        self._activity = Activity(report.activity)
        self._events += [
            event for event in report.events if report.num_orders >= self._dropped.get(event.request_id, 0)
        ]
        self._dropped = {each: number for each, number in self._dropped.items() if number > report.num_orders}
        if report.error is not None and report.num_orders >= self._last_drop:  # else perhaps of what is dropped
            self._error = report.error
        self._breakdown = self._breakdown or report.breakdown
        for answer in report.answers:
            if answer.number == self._question:
                self._question, self._answer = None, answer

    def _ask(self, question: Question, request_id: str = "", wait_s: float = ANSWER_S) -> Any:
        """Asks the engine between two steps; raises what that raises, and TimeoutError where no answer comes. A servant
        that has not answered the last question yet is not waited for again.
        """
        stage = self._spec.stage.name
        until = time.monotonic() + wait_s
        with self._lock:
            self._collect()
            if self._question is not None:
                raise TimeoutError(f"stage {stage!r} does not answer")
            self._num_questions += 1
            self._order(Ask(self._num_questions, question, request_id))
            self._question, self._answer = self._num_questions, None
        while (answer := self._answer) is None:
            left_s = until - time.monotonic()
            if self.breakdown() is not None:
                raise TimeoutError(f"stage {stage!r} has ended")
            if self._answer is None and left_s <= 0:
                raise TimeoutError(f"stage {stage!r} did not answer within {wait_s:g} s")
            if self._answer is None:
                self._wait_for_report(left_s)
        if answer.error is not None:
            raise answer.error
        return answer.value
