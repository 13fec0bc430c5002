"""What the two halves of an executor tell each other whose engine runs elsewhere: orders of the caller, and reports of
the servant that holds the engine.

Orders are numbered by their place: a report says how many of them were carried out when its events were made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vllm_omni.errors import StageError
from vllm_omni.messages import StageDone, StageEvent, StageTask
from vllm_omni.payload import StagePayload, StreamChunk
from vllm_omni.utils.checks import brief

Question = Literal["is_there", "partial_result", "save_state", "get_stats", "check_integrity"]


@dataclass(frozen=True, slots=True)
class Submit:
    """As StageEngine.submit."""

    task: StageTask

    @property
    def request_id(self) -> str:
        return self.task.request_id

    def for_another_process(self, prepared: Any) -> Submit:
        """What a stage's `check` prepared may be anything: `prepared` is what travels of it. What the request saved of
        other stages does not.
        """
        task = dataclasses.replace(self.task, prepared=prepared)
        if task.request.saved:
            task = dataclasses.replace(task, request=dataclasses.replace(task.request, saved={}))
        return Submit(task)


@dataclass(frozen=True, slots=True)
class FeedChunk:
    """As StageEngine.feed."""

    request_id: str
    port: str
    chunk: StreamChunk


@dataclass(frozen=True, slots=True)
class Hold:
    """As StageEngine.pause."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Release:
    """As StageEngine.resume."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Drop:
    """As StageEngine.abort. No event of the task is heard any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A question that is answered between two steps."""

    number: int
    question: Question
    request_id: str = ""  # of `partial_result` and `save_state`


@dataclass(frozen=True, slots=True)
class Refuse:
    """In place of an order about a task, which could not be brought here whole: the task ends with the error."""

    request_id: str
    error: Exception


StageOrder = Submit | FeedChunk | Hold | Release | Drop | Ask | Refuse


@dataclass(frozen=True, slots=True)
class Answer:
    """To the question of that number: its value, or what asking it raised."""

    number: int
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one turn: orders, then at most one step."""

    num_orders: int  # carried out since the engine was loaded
    activity: str  # the engine's, behind the turn: a value of Activity
    events: Sequence[StageEvent] = ()
    answers: Sequence[Answer] = ()
    error: Exception | None = None  # what the step raised; the engine may go on
    breakdown: Exception | None = None  # why the engine cannot go on

    def __post_init__(self) -> None:
        """StageError for what no servant reports: it may come from another process."""
        is_right = type(self.num_orders) is int and isinstance(self.activity, str)
        is_right &= all(map(is_event, self.events)) and all(isinstance(each, Answer) for each in self.answers)
        if not is_right or not all(isinstance(each, Exception | None) for each in (self.error, self.breakdown)):
            raise StageError(f"got the report {brief(self)}, expected counts, events and answers")


def is_event(value: object) -> bool:
    """Whether it is one that says of which task it is."""
    if isinstance(value, StageDone) and not isinstance(value.payload, StagePayload):
        return False
    return isinstance(value, StageEvent) and isinstance(value.request_id, str)
