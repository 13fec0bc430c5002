"""The guard of one stage: what its engine does wrong becomes a failure of the tasks it holds, never of the loop.

Knows the tasks that the stage holds, which of them wait for a chunk or are paused, and since when it is silent; not
what comes before or after the stage.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.base import StageDone, StageEngine, StageEvent, StageFailed, StageTask
from vllm_omni.engine.boundary import describe, stage_boundary, stage_error
from vllm_omni.errors import StageError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.params import StageParams
from vllm_omni.payload import StreamChunk
from vllm_omni.request import OmniRequest

MAX_RAISES = 2


class StageHost:
    """One stage, its executor and its tasks.

    An engine that raises from `step` loses its tasks and goes on; raising twice without a finished task in between, or
    being unable to forget the tasks cleanly, marks the stage dead: `check` then raises, and new tasks fail. paused: the
    tasks that were told to make no more rows.
    """

    def __init__(self, stage: StageConfig, engine_class: type[StageEngine], executor: StageExecutor) -> None:
        self.stage = stage
        self.engine_class = engine_class
        self.executor = executor
        self.tasks: set[str] = set()
        self.paused: set[str] = set()
        self.cause_of_death: Exception | None = None
        self._open: dict[str, set[str]] = {}  # tasks -> streamed inputs of which more chunks will come
        self._num_raises = 0
        self._quiet_since: float | None = None

    @property
    def name(self) -> str:
        return self.stage.name

    def check(self, request: OmniRequest, params: StageParams) -> None:
        """As StageEngine.check; StageError when the stage is dead."""
        self._ensure_alive()
        with stage_boundary(self.name):
            self.executor.check(request, params)

    def job_size(self, request: OmniRequest, params: StageParams) -> float:
        """As StageEngine.job_size."""
        with stage_boundary(self.name):
            return self.executor.job_size(request, params)

    def submit(self, task: StageTask) -> None:
        """Hands a task over; StageError when that fails."""
        self._ensure_alive()
        if not self.tasks:
            self._quiet_since = None
        self.tasks.add(task.request_id)
        with self._losing(task.request_id):
            self.executor.submit(task)
        chunks = {port: value for port, value in task.inputs.items() if isinstance(value, StreamChunk)}
        self._open[task.request_id] = {port for port, chunk in chunks.items() if not chunk.is_last}

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """Hands a chunk over, where the task is still there; StageError, and the task is lost, when that fails."""
        if request_id in self.tasks:
            with self._losing(request_id):
                self.executor.feed(request_id, port, chunk)
            if chunk.is_last:
                self._open[request_id].discard(port)

    def pause(self, request_id: str) -> None:
        """Holds a task back, where it is still there; StageError, and the task is lost, when that fails."""
        if request_id in self.tasks:
            with self._losing(request_id):
                self.executor.pause(request_id)
            self.paused.add(request_id)

    def resume(self, request_id: str) -> None:
        """Ends a pause; StageError, and the task is lost, when that fails."""
        if request_id in self.tasks:
            with self._losing(request_id):
                self.executor.resume(request_id)
            self.paused.discard(request_id)

    def poll(self, clock: Callable[[], float], worker_timeout: float) -> list[StageEvent]:
        """What the stage reports. Failures carry a StageError; a raise, or being stuck, fails all tasks.

        Stuck is a stage that reports nothing for `worker_timeout` seconds after a step that reported nothing, or one
        that has nothing to do and yet holds tasks that neither wait for a chunk nor are paused.
        """
        if not self.tasks:
            return []
        try:
            events = [self._settled(event) for event in self.executor.poll()]
            has_work = self.executor.has_work()
        except Exception as error:
            return self._break(error)
        return events + self._stuck(bool(events), has_work, clock(), worker_timeout)

    def hold(self) -> None:
        """It is not stepped for now; its silence meanwhile is not its own."""
        self._quiet_since = None

    def has_work(self) -> bool:
        """Whether a step would do something. Not of a stage that cannot say: what is wrong with it shows when it is
        stepped.
        """
        try:
            return bool(self.tasks) and self.executor.has_work()
        except Exception:
            return False

    def abort(self, request_id: str) -> None:
        """Forgets a task; unknown ones are fine."""
        if request_id in self.tasks:
            self._settle(request_id)
            self._forget(request_id)

    def check_integrity(self) -> None:
        """Raises what the engine finds wrong with itself, and StageError when books are kept of a task that is gone."""
        if self.tasks != set(self._open) or not self.paused <= self.tasks:
            raise StageError(
                f"stage {self.name!r}: holds {sorted(self.tasks)}, has streams of {sorted(self._open)}, pauses of "
                f"{sorted(self.paused)}"
            )
        if self.cause_of_death is None:
            self.executor.check_integrity()

    def _settled(self, event: StageEvent) -> StageEvent:
        if isinstance(event, StageDone):
            self._num_raises = 0
        if isinstance(event, StageDone | StageFailed):
            self._settle(event.request_id)
        if isinstance(event, StageFailed):
            return StageFailed(event.request_id, stage_error(self.name, event.error))
        return event

    def _stuck(self, has_events: bool, has_work: bool, now: float, worker_timeout: float) -> list[StageEvent]:
        if not self.tasks:
            return []
        if not has_work:
            self._quiet_since = None
            idle = [task for task in self.tasks if not self._open[task] and task not in self.paused]
            return self._fail(idle, StageError("the engine has nothing to do, but has not finished this task"))
        if has_events or self._quiet_since is None:
            self._quiet_since = now
        elif now - self._quiet_since >= worker_timeout:
            silence_s = now - self._quiet_since
            return self._fail(
                self.tasks,
                StageError(f"no progress for {silence_s:.1f} s; raise scheduler.worker_timeout_s if it is just slow"),
            )
        return []

    def _break(self, error: Exception) -> list[StageEvent]:
        self._num_raises += 1
        failures = self._fail(self.tasks, error)
        try:
            self.executor.check_integrity()
        except Exception as broken:
            self._die(broken)
        if self._num_raises >= MAX_RAISES:
            self._die(error)
        return failures

    def _fail(self, tasks: Iterable[str], cause: Exception) -> list[StageEvent]:
        failed = sorted(tasks)
        for request_id in failed:
            self.abort(request_id)
        return [StageFailed(request_id, stage_error(self.name, cause)) for request_id in failed]

    @contextmanager
    def _losing(self, request_id: str) -> Iterator[None]:
        """A task whose engine raises over it is lost."""
        try:
            yield
        except Exception as error:
            self.abort(request_id)
            raise stage_error(self.name, error) from error

    def _settle(self, request_id: str) -> None:
        """Strikes a task off the books."""
        self.tasks.discard(request_id)
        self.paused.discard(request_id)
        self._open.pop(request_id, None)

    def _forget(self, request_id: str) -> None:
        try:
            self.executor.abort(request_id)
        except Exception as error:
            self._die(error)

    def _die(self, cause: Exception) -> None:
        traceback.clear_frames(cause.__traceback__)
        self.cause_of_death = self.cause_of_death or cause

    def _ensure_alive(self) -> None:
        if self.cause_of_death is not None:
            message = f"stage {self.name!r} is dead since it raised {describe(self.cause_of_death)}; make a new Omni"
            raise StageError(message) from self.cause_of_death
