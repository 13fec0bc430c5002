"""The guard of one stage: what its engine does wrong becomes a failure of the tasks it holds, never of the loop.

Knows the tasks that the stage holds and since when it is silent; not what comes before or after the stage.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable

from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.base import StageDone, StageEngine, StageEvent, StageFailed, StageTask
from vllm_omni.engine.boundary import describe, stage_boundary, stage_error
from vllm_omni.errors import StageError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.params import StageParams
from vllm_omni.request import OmniRequest

MAX_RAISES = 2


class StageHost:
    """One stage, its executor and its tasks.

    An engine that raises from `step` loses its tasks and goes on; raising twice without a finished task in between, or
    being unable to forget the tasks cleanly, marks the stage dead: `check` then raises, and new tasks fail.
    """

    def __init__(self, stage: StageConfig, engine_class: type[StageEngine], executor: StageExecutor) -> None:
        self.stage = stage
        self.engine_class = engine_class
        self.executor = executor
        self.tasks: set[str] = set()
        self.cause_of_death: Exception | None = None
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
        try:
            self.executor.submit(task)
        except Exception as error:
            self._forget(task.request_id)
            raise stage_error(self.name, error) from error
        self.tasks.add(task.request_id)

    def poll(self, clock: Callable[[], float], worker_timeout: float) -> list[StageEvent]:
        """What the stage reports. Failures carry a StageError; a raise, or being stuck, fails all tasks.

        Stuck is a stage that reports nothing for `worker_timeout` seconds after a step that reported nothing, or one
        that has nothing to do and yet holds tasks.
        """
        if not self.tasks:
            return []
        try:
            events = [self._settled(event) for event in self.executor.poll()]
            has_work = self.executor.has_work()
        except Exception as error:
            return self._break(error)
        return events + self._stuck(bool(events), has_work, clock(), worker_timeout)

    def abort(self, request_id: str) -> None:
        """Forgets a task; unknown ones are fine."""
        if request_id in self.tasks:
            self.tasks.discard(request_id)
            self._forget(request_id)

    def check_integrity(self) -> None:
        """Raises what the engine finds wrong with itself."""
        if self.cause_of_death is None:
            self.executor.check_integrity()

    def _settled(self, event: StageEvent) -> StageEvent:
        if isinstance(event, StageDone):
            self._num_raises = 0
        if isinstance(event, StageDone | StageFailed):
            self.tasks.discard(event.request_id)
        if isinstance(event, StageFailed):
            return StageFailed(event.request_id, stage_error(self.name, event.error))
        return event

    def _stuck(self, has_events: bool, has_work: bool, now: float, worker_timeout: float) -> list[StageEvent]:
        if not self.tasks:
            return []
        if not has_work:
            return self._fail_all(StageError("the engine has nothing to do, but has not finished this task"))
        if has_events or self._quiet_since is None:
            self._quiet_since = now
        elif now - self._quiet_since >= worker_timeout:
            silence_s = now - self._quiet_since
            return self._fail_all(
                StageError(f"no progress for {silence_s:.1f} s; raise scheduler.worker_timeout_s if it is just slow")
            )
        return []

    def _break(self, error: Exception) -> list[StageEvent]:
        self._num_raises += 1
        failures = self._fail_all(error)
        try:
            self.executor.check_integrity()
        except Exception as broken:
            self._die(broken)
        if self._num_raises >= MAX_RAISES:
            self._die(error)
        return failures

    def _fail_all(self, cause: Exception) -> list[StageEvent]:
        failed = sorted(self.tasks)
        for request_id in failed:
            self.abort(request_id)
        return [StageFailed(request_id, stage_error(self.name, cause)) for request_id in failed]

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
