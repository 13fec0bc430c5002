"""An executor that hosts its engine in a thread of its own, so that stages on different devices need not wait for each
other. Tensors pass by reference; which tasks share a batch depends on time.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import Any, TypeVar

from vllm_omni.engine.base import Activity, EngineContext, StageEngine, StageSpec
from vllm_omni.engine.boundary import as_stage_error
from vllm_omni.errors import StageError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.messages import StageEvent, StageFailed, StageTask
from vllm_omni.payload import StagePayload, StreamChunk
from vllm_omni.worker.background import Background

T = TypeVar("T")
ANSWER_S = 0.1  # the most that the loop waits for the end of a step, to be told something
CHECK_S = 2.0  # ... to be told whether all is well
SAVE_S = 30.0  # ... to be told what a task has come to, which a step of a large model keeps waiting
SHUTDOWN_S = 10.0  # ... to leave no thread behind


class ThreadExecutor(StageExecutor):
    """The thread loads the engine, then carries out the orders that the caller queues between two steps, and queues
    events.

    Everything that both threads touch is guarded by `_changed`; the engine belongs to the thread alone. A thread that
    is stuck in a step is left behind by `shutdown(wait=False)`; it ends when the step does, if ever.
    """

    def __init__(self, spec: StageSpec, context: EngineContext, wake: Callable[[], None]) -> None:
        self._spec = spec
        self._wake = wake
        self._background = Background(self._notify)
        self._context = dataclasses.replace(context, background=self._background)
        self._changed = threading.Condition()
        self._orders: deque[Callable[[StageEngine], None]] = deque()
        self._events: list[StageEvent] = []
        self._dropped: set[str] = set()  # tasks that were aborted, until the engine knows it
        self._error: Exception | None = None  # what a step raised, for the next poll
        self._breakdown: Exception | None = None  # why the thread has ended
        self._question: Future[Any] | None = None  # the last one that was asked
        self._stats: Mapping[str, Any] = {}  # the last that were told
        self._loaded: Future[None] = Future()
        self._is_working = False
        self._activity = Activity.IDLE  # the engine's own, after its last step
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name=f"omni-{self._spec.stage.name}", daemon=True)
            self._thread.start()

    def is_loaded(self) -> bool:
        if self._loaded.done():
            self._loaded.result()
        return self._loaded.done()

    def ensure_loaded(self) -> None:
        self._loaded.result()

    def submit(self, task: StageTask) -> None:
        self._order_for(task.request_id, lambda engine: engine.submit(task))

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        self._order_for(request_id, lambda engine: engine.feed(request_id, port, chunk))

    def pause(self, request_id: str) -> None:
        self._order_for(request_id, lambda engine: engine.pause(request_id))

    def resume(self, request_id: str) -> None:
        self._order_for(request_id, lambda engine: engine.resume(request_id))

    def abort(self, request_id: str) -> None:
        def drop(engine: StageEngine) -> None:
            self._drop(engine, request_id)
            self._dropped.discard(request_id)

        with self._changed:
            self._dropped.add(request_id)
            self._events = [event for event in self._events if event.request_id != request_id]
            self._queue(drop)

    def partial_result(self, request_id: str) -> StagePayload | None:
        try:
            return self._ask(lambda engine: engine.partial_result(request_id))
        except TimeoutError:
            return None

    def save_state(self, request_id: str) -> Mapping[str, Any] | None:
        try:
            return self._ask(lambda engine: engine.save_state(request_id), SAVE_S)
        except TimeoutError as error:
            raise StageError(f"{error}; save again after the next step") from error

    def poll(self) -> list[StageEvent]:
        with self._changed:
            error, self._error = self._error, None
            if error is not None:
                raise error
            events, self._events = self._events, []
            return events

    def activity(self) -> Activity:
        with self._changed:
            if self._events or self._error is not None:
                return Activity.BUSY
            is_stepping = self._orders or self._is_working or self._activity is Activity.BUSY
            return Activity.STEPPING if is_stepping else self._activity

    def responds(self) -> bool:
        try:
            self._ask(lambda engine: None)
        except TimeoutError:
            return False
        return True

    def breakdown(self) -> Exception | None:
        return self._breakdown

    def get_stats(self) -> Mapping[str, Any]:
        if self._thread is not None:
            with suppress(TimeoutError):
                self._stats = self._ask(lambda engine: dict(engine.get_stats()))
        return self._stats

    def check_integrity(self) -> None:
        self._ask(lambda engine: engine.check_integrity(), CHECK_S)

    def shutdown(self, *, wait: bool = True) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._background.shutdown()
        thread, self._thread = self._thread, None
        if wait and thread is not None:
            thread.join(SHUTDOWN_S)

    def _order_for(self, request_id: str, order: Callable[[StageEngine], None]) -> None:
        """An order about a task; what it raises ends that task."""

        def carry_out(engine: StageEngine) -> None:
            try:
                order(engine)
            except Exception as error:
                self._drop(engine, request_id)
                self._report([StageFailed(request_id, as_stage_error(self._spec.stage.name, error))])

        with self._changed:
            self._queue(carry_out)

    def _queue(self, order: Callable[[StageEngine], None]) -> None:
        if self._thread is None or self._is_stopping:
            raise StageError(f"stage {self._spec.stage.name!r}: not started, or shut down")
        self._orders.append(order)
        self._changed.notify()

    def _drop(self, engine: StageEngine, request_id: str) -> None:
        """An engine that cannot drop a task is of no use."""
        try:
            engine.abort(request_id)
        except Exception as error:
            self._breakdown = self._breakdown or error

    def _ask(self, question: Callable[[StageEngine], T], wait_s: float = ANSWER_S) -> T:
        """Asks the engine between two steps; raises what that raises, and TimeoutError where no answer comes. A thread
        that has not answered the last question yet is not waited for again.
        """
        if self._question is not None and not self._question.done():
            raise TimeoutError(f"stage {self._spec.stage.name!r} does not answer")
        answer: Future[T] = Future()

        def reply(engine: StageEngine) -> None:
            try:
                answer.set_result(question(engine))
            except Exception as error:
                answer.set_exception(error)

        with self._changed:
            self._queue(reply)
        self._question = answer
        if not wait_for([answer], wait_s).done:
            raise TimeoutError(f"stage {self._spec.stage.name!r} did not answer within {wait_s:g} s")
        return answer.result()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    def _report(self, events: list[StageEvent]) -> None:
        with self._changed:
            self._events += [event for event in events if event.request_id not in self._dropped]

    def _main(self) -> None:
        try:
            engine = self._spec.load(self._context)
        except BaseException as error:
            self._loaded.set_exception(error)
            self._wake()
            return
        self._loaded.set_result(None)
        self._wake()
        try:
            self._run(engine)
        except BaseException as error:  # such as SystemExit, which ends the thread alone
            self._breakdown = StageError(f"its thread was ended by {type(error).__name__}: {error}")
            self._wake()

    def _run(self, engine: StageEngine) -> None:
        while self._breakdown is None:
            with self._changed:
                self._is_working = False
                self._activity = self._activity_of(engine)
                while not self._orders and not self._is_stopping and self._activity is not Activity.BUSY:
                    self._changed.wait()
                    self._activity = self._activity_of(engine)
                if self._is_stopping:
                    return
                self._is_working = True
                orders, self._orders = list(self._orders), deque()
            for order in orders:
                order(engine)
            self._step(engine)
            self._wake()

    def _step(self, engine: StageEngine) -> None:
        try:
            if engine.activity() is Activity.BUSY:
                self._report(engine.step())
        except Exception as error:
            with self._changed:
                self._error = error

    def _activity_of(self, engine: StageEngine) -> Activity:
        """BUSY of an engine that cannot say: what is wrong with it shows when it is stepped."""
        try:
            return engine.activity() if self._error is None else Activity.PENDING
        except Exception:
            return Activity.BUSY
