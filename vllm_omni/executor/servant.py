"""The half of an executor that stands beside the engine: carries out orders between two steps, and reports.

Knows no thread, socket or process. Whoever hosts it (a thread, a process, an actor) brings the orders, calls `turn` as
long as it `has_work`, and carries the reports to the caller's half, `ServedExecutor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_omni.engine.base import Activity, StageEngine
from vllm_omni.engine.boundary import as_stage_error, clear_frames
from vllm_omni.errors import StageError
from vllm_omni.executor.orders import (
    Answer,
    Ask,
    Drop,
    FeedChunk,
    Hold,
    Refuse,
    Release,
    Report,
    StageOrder,
    Submit,
    is_event,
)
from vllm_omni.messages import StageEvent, StageFailed, StageTask
from vllm_omni.utils.checks import brief
from vllm_omni.utils.device import is_out_of_memory, release_memory


def _unchanged(task: StageTask) -> StageTask:
    return task


class StageServant:
    """Of one engine, which belongs to it alone. prepare: fills in what a task lacks, where it came without.

    What an order about a task raises ends that task. What a step raises is reported, and there is no other step before
    an order about a task. An engine that cannot drop a task is of no use: a breakdown, and no turn should follow.
    """

    def __init__(self, stage: str, engine: StageEngine, prepare: Callable[[StageTask], StageTask] = _unchanged) -> None:
        self._stage = stage
        self._engine = engine
        self._prepare = prepare
        self._num_orders = 0
        self._events: list[StageEvent] = []
        self._answers: list[Answer] = []
        self._is_halted = False  # a step has raised: whoever ordered it says what is next
        self._breakdown: Exception | None = None
        self._said = Activity.IDLE  # in the last report

    def has_work(self) -> bool:
        """Whether a turn would do something without an order."""
        return self._breakdown is None and self.activity() is Activity.BUSY

    def activity(self) -> Activity:
        """The engine's. BUSY of one that cannot say: what is wrong with it shows when it is stepped."""
        if self._is_halted:
            return Activity.PENDING
        try:
            return self._engine.activity()
        except Exception:
            return Activity.BUSY

    def news(self) -> Report | None:
        """A report where the last one said that nothing is done, and a turn without an order would now do something: a
        step that hangs is to be known as one.
        """
        if self._said is Activity.BUSY or not self.has_work():
            return None
        return self._report(None)

    def turn(self, orders: Sequence[StageOrder]) -> Report:
        """Carries out the orders, then makes one step where there is something to do. What is no Exception (SystemExit)
        goes through, and ends the host.
        """
        for order in orders:
            self._num_orders += 1
            self._is_halted = self._is_halted and isinstance(order, Ask)
            self._carry_out(order)
        error = self._step() if self._breakdown is None else None
        self._breakdown = self._breakdown or self._engine.breakdown()
        return self._report(error)

    def unsent(self, report: Report, error: Exception) -> Report:
        """What takes the place of a report that cannot be carried: as if its step and its questions had raised."""
        self._is_halted = True
        answers = [Answer(answer.number, error=error) for answer in report.answers]
        return Report(report.num_orders, self.activity().value, (), answers, error, report.breakdown)

    def _report(self, error: Exception | None) -> Report:
        events, self._events = self._events, []
        answers, self._answers = self._answers, []
        self._said = self.activity()
        return Report(self._num_orders, self._said.value, events, answers, error, self._breakdown)

    def _step(self) -> Exception | None:
        try:
            if self._engine.activity() is Activity.BUSY and not self._is_halted:
                for event in self._engine.step():
                    if not is_event(event):
                        raise StageError(f"got {brief(event)} from a step, expected an event")
                    self._events.append(event)
        except Exception as error:
            clear_frames(error)
            self._is_halted = True
            if is_out_of_memory(error):
                release_memory()
            return error
        return None

    def _carry_out(self, order: StageOrder) -> None:
        if isinstance(order, Ask):
            self._answers.append(self._answer(order))
        elif isinstance(order, Drop):
            self._events = [event for event in self._events if event.request_id != order.request_id]
            self._drop(order.request_id)
        else:
            try:
                self._do(order)
            except Exception as error:
                self._drop(order.request_id)
                self._events.append(StageFailed(order.request_id, as_stage_error(self._stage, error)))

    def _do(self, order: Submit | FeedChunk | Hold | Release | Refuse) -> None:
        if isinstance(order, Refuse):
            raise order.error
        if isinstance(order, Submit):
            self._engine.submit(self._prepare(order.task))
        elif isinstance(order, FeedChunk):
            self._engine.feed(order.request_id, order.port, order.chunk)
        elif isinstance(order, Hold):
            self._engine.pause(order.request_id)
        else:
            self._engine.resume(order.request_id)

    def _drop(self, request_id: str) -> None:
        try:
            self._engine.abort(request_id)
        except Exception as error:
            self._breakdown = self._breakdown or error

    def _answer(self, ask: Ask) -> Answer:
        try:
            return Answer(ask.number, self._asked(ask))
        except Exception as error:
            clear_frames(error)
            return Answer(ask.number, error=error)

    def _asked(self, ask: Ask) -> Any:
        if ask.question == "partial_result":
            return self._engine.partial_result(ask.request_id)
        if ask.question == "save_state":
            return self._engine.save_state(ask.request_id)
        if ask.question == "get_stats":
            stats: Mapping[str, Any] = self._engine.get_stats()
            return dict(stats)
        if ask.question == "check_integrity":
            self._engine.check_integrity()
        return None
