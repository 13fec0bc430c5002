"""The contract of a stage executor: where a stage's engine runs. The loop above it is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from vllm_omni.engine.base import Activity, EngineContext, StageSpec
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.payload import StagePayload, StreamChunk


class StageExecutor(ABC):
    """Hosts the engine of one stage, from `start` to `shutdown`, once; a stage that is rebuilt has another one.

    No method but `ensure_loaded` blocks for longer than one engine step in the caller's thread, and none waits for an
    engine that runs elsewhere and is stuck. Such an executor calls `commons.wake` when there is something to poll.
    """

    shares_memory: ClassVar[bool] = True  # whether its engine is in this process, and shares weights with others here
    is_bystander: bool = False  # whether it has broken down over another stage, with which it shares a process
    num_models: int = 0  # that its engine has loaded in another process

    @abstractmethod
    def __init__(self, spec: StageSpec, context: EngineContext, commons: Commons, blueprint: StageBlueprint) -> None:
        """Takes down what to host; `start` does the work. blueprint: what an engine in another process is made of."""

    @abstractmethod
    def start(self) -> None:
        """Begins to load the engine; where it runs in the caller's thread, it is loaded when this returns."""

    @abstractmethod
    def is_loaded(self) -> bool:
        """Whether tasks can be submitted; raises what loading raised."""

    @abstractmethod
    def ensure_loaded(self) -> None:
        """Waits until it is loaded; raises what loading raised."""

    @abstractmethod
    def submit(self, task: StageTask) -> None:
        """As StageEngine.submit."""

    @abstractmethod
    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """As StageEngine.feed."""

    @abstractmethod
    def pause(self, request_id: str) -> None:
        """As StageEngine.pause."""

    @abstractmethod
    def resume(self, request_id: str) -> None:
        """As StageEngine.resume."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """As StageEngine.abort: no event of the task follows."""

    @abstractmethod
    def partial_result(self, request_id: str) -> StagePayload | None:
        """As StageEngine.partial_result; None where the engine does not answer in time."""

    @abstractmethod
    def save_state(self, request_id: str) -> Mapping[str, Any] | None:
        """As StageEngine.save_state; StageError where the engine does not answer in time."""

    @abstractmethod
    def poll(self) -> list[StageEvent]:
        """Events since the last poll; an inline executor runs one engine step here."""

    @abstractmethod
    def activity(self) -> Activity:
        """BUSY: `poll` would do or bring something. STEPPING, PENDING: `wake` will be called when it would; the engine
        is at work, or waits for something beside it. IDLE: only an order can change that.
        """

    @abstractmethod
    def responds(self) -> bool:
        """Whether the engine answers; not while it is stuck in a step."""

    @abstractmethod
    def breakdown(self) -> Exception | None:
        """Why the engine cannot go on, where that shows in no `poll`."""

    @abstractmethod
    def get_stats(self) -> Mapping[str, Any]:
        """As StageEngine.get_stats; the last known ones where the engine does not answer in time."""

    @abstractmethod
    def check_integrity(self) -> None:
        """As StageEngine.check_integrity; raises also where the engine does not answer in time."""

    def place(self) -> Mapping[str, Any]:
        """Where the engine is, for the status: `pid` of another process, `host` and `node` of another machine."""
        return {}

    @abstractmethod
    def shutdown(self, *, wait: bool = True) -> None:
        """Frees the engine; may be called twice. wait: for a step that is under way; else the engine is freed when it
        has ended, and nothing that it reports is heard.
        """
