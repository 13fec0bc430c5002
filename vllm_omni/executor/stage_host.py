"""The guard of one executor: what its engine does wrong becomes a failure of the tasks it holds, never of the loop.

Owns the executor, which it replaces when the engine breaks, and knows which tasks that has. Knows since when it is
silent; not what a task was given, whether it can be run again, nor who is paused.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm_omni.engine.base import Activity
from vllm_omni.engine.boundary import clear_frames, describe, stage_boundary, stage_error
from vllm_omni.errors import StageError, StageUnavailableError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.executor.recovery import Recovery
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageRows, StageTask, StageWorked
from vllm_omni.payload import StagePayload, StreamChunk
from vllm_omni.utils.device import is_out_of_memory, release_memory

MAX_FAILURES = 2
FAILURE_OF_RETRIED = 0.5  # what one counts whose tasks are run again: the one to blame will most likely raise twice


class StageHost:
    """One replica of a stage. build: makes an executor, not started. streamed_ports: outputs that another stage reads
    row by row.

    An engine that raises from `step`, or is silent for too long, loses its tasks and goes on. Doing so several times
    without a finished task in between, being stuck in a step, or being unable to drop a task cleanly breaks it: it is
    rebuilt, and takes no tasks meanwhile. Failures say whether the task was lost (`StageFailed.is_lost`).
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], StageExecutor],
        streamed_ports: Collection[str],
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.executor = build()
        self.tasks: dict[str, set[str]] = {}  # request id -> the ports below of which it has given no row yet
        self._build = build
        self._clock = clock
        self._streamed_ports = frozenset(streamed_ports)
        self._num_failures = 0.0  # since a task has finished
        self._quiet_since: float | None = None
        self._broken: Exception | None = None  # why the engine is to be given up, at the next `poll` or `mend`
        self._recovery = Recovery()
        self._is_shut_down = False

    def load(self) -> None:
        """Begins to load the engine; what fails at once leaves nothing behind."""
        self._loading(self.executor.start)

    def ensure_loaded(self) -> None:
        """Waits for the engine; leaves nothing behind when loading has failed."""
        self._loading(self.executor.ensure_loaded)

    def ensure_ready(self) -> None:
        """StageUnavailableError while it is being rebuilt."""
        cause = self._cause
        if cause is not None:
            retry_after_s = self.retry_after_s
            words = f"stage {self.name!r} is being rebuilt after a failure ({describe(cause)})"
            if self._recovery.is_planned:
                words = f"stage {self.name!r} is being restarted"
            raise StageUnavailableError(f"{words}; retry in {retry_after_s:.1f} s", retry_after_s) from cause

    def restart(self) -> None:
        """Gives up an engine that has no tasks; `mend` makes another."""
        self.executor.shutdown(wait=False)
        self._quiet_since = None
        self._recovery.plan(StageError(f"stage {self.name!r} is being restarted"), self._clock())

    def mend(self, worker_timeout: float) -> None:
        """Goes on with a rebuild, where there is one: waits for its time, loads, is ready. Never waits for a thread.

        An engine that is still at work on tasks that are gone, and silent for `worker_timeout` s, is given up.
        """
        recovery, now = self._recovery, self._clock()
        if not self.tasks:
            silent_s = self._silent_s()
            if silent_s >= worker_timeout:
                self._break(StageError(f"no answer for {silent_s:.1f} s"))
            self._give_up()
        if recovery.cause is None or self._is_shut_down:
            return
        try:
            if recovery.is_due(now):
                recovery.load(now)
                if is_out_of_memory(recovery.cause):
                    _collect_all()
                    release_memory()
                self.executor = self._build()
                self.executor.start()
            if recovery.is_loading and self.executor.is_loaded():
                recovery.end(self._clock())
        except BaseException as error:
            clear_frames(error)
            self.executor.shutdown(wait=False)
            recovery.begin(error if isinstance(error, Exception) else recovery.cause, now)
            if not isinstance(error, Exception):
                raise

    def shutdown(self) -> None:
        """Frees the engine for good; may be called twice."""
        self._is_shut_down = True
        self.executor.shutdown()

    def submit(self, task: StageTask) -> None:
        """Hands a task over, its inputs cut. StageError, and the task is dropped, when that fails."""
        self.ensure_ready()
        if not self.tasks and not self._is_stepping:
            self._quiet_since = None
        self.tasks[task.request_id] = set(self._streamed_ports)
        with self._dropping(task.request_id):
            self.executor.submit(task)

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        """Where the task is still there; StageError, and the task is dropped, when that fails."""
        if request_id in self.tasks:
            with self._dropping(request_id):
                self.executor.feed(request_id, port, chunk)

    def pause(self, request_id: str) -> None:
        """As `feed`."""
        if request_id in self.tasks:
            with self._dropping(request_id):
                self.executor.pause(request_id)

    def resume(self, request_id: str) -> None:
        """As `feed`."""
        if request_id in self.tasks:
            with self._dropping(request_id):
                self.executor.resume(request_id)

    def poll(self, worker_timeout: float, is_waiting: Callable[[str], bool]) -> list[StageEvent]:
        """What the stage reports. Failures carry a StageError; a raise, or being stuck, fails all tasks.

        Stuck is a stage that reports nothing for `worker_timeout` seconds after a step that reported nothing, or one
        that has nothing to do and yet holds tasks; not one that waits for work beside it (a file that is decoded).
        is_waiting: whether a task is paused or will be given more chunks.
        """
        failures, now = self._give_up(), self._clock()
        if not self.tasks:
            return failures
        if self._quiet_since is None:
            self._quiet_since = now
        events: list[StageEvent] = []
        try:
            reported = self.executor.poll()
            for found in reported:
                events.extend(self._received(found))
            activity = self.executor.activity()
        except Exception as error:
            return events + self._fail_all(error, is_lost=True)
        return events + self._stuck(bool(reported), activity, now, worker_timeout, is_waiting)

    def hold(self) -> None:
        """It is not stepped for now; its silence meanwhile is not its own."""
        self._quiet_since = None

    def is_busy(self) -> bool:
        """Whether a poll would do something. Also of a stage that cannot say: what is wrong shows when it is polled."""
        try:
            return bool(self.tasks) and (self._is_broken or self.executor.activity() is Activity.BUSY)
        except Exception:
            return True

    def partial_result(self, request_id: str) -> StagePayload | None:
        """What a task has made so far; None where the engine does not say."""
        try:
            return self.executor.partial_result(request_id) if request_id in self.tasks else None
        except Exception:
            return None

    def save_state(self, request_id: str) -> Mapping[str, Any] | None:
        """What of a task is needed to go on with it later; None where it is not here, or that is nothing. StageError
        where the engine cannot say.
        """
        with stage_boundary(self.name):
            return self.executor.save_state(request_id) if request_id in self.tasks else None

    def abort(self, request_id: str) -> None:
        """Drops a task; unknown ones are fine."""
        if request_id in self.tasks:
            del self.tasks[request_id]
            self._drop(request_id)

    def check_integrity(self) -> None:
        """Raises what the engine finds wrong with itself."""
        if self.is_ready and not self._is_broken:
            self.executor.check_integrity()

    def get_status(self, worker_timeout: float) -> dict[str, Any]:
        """Gauges; safe to call from another thread. state: rebuilding, restarting, stuck (no answer for
        `worker_timeout` s, though it is at work) or ready, which alone is `alive`; silent_s: since the last answer;
        cause: why it is not ready; pid: of its process, where it has one of its own.
        """
        cause, silent_s = self._cause, self._silent_s()
        state, why = "ready", None
        if cause is not None:
            state, why = ("restarting", None) if self._recovery.is_planned else ("rebuilding", describe(cause))
        elif silent_s >= worker_timeout:
            state, why = "stuck", f"no answer for {silent_s:.1f} s"
        return {
            "tasks": len(self.tasks),
            "alive": state == "ready",
            "state": state,
            "silent_s": silent_s,
            "num_rebuilds": self._recovery.num_rebuilds,
            "cause": why,
            **self.executor.place(),
        }

    @property
    def is_ready(self) -> bool:
        """Whether it has an engine; else it is being rebuilt."""
        return self._recovery.cause is None

    @property
    def takes_tasks(self) -> bool:
        """Whether it has an engine that is not about to be given up."""
        return self.is_ready and not self._is_broken

    @property
    def is_hopeless(self) -> bool:
        """Whether the last attempt to rebuild it has failed."""
        return self._recovery.has_failed

    @property
    def is_planned(self) -> bool:
        """Whether it is being restarted, though nothing is wrong."""
        return self._recovery.is_planned

    @property
    def retry_after_s(self) -> float:
        """When it may take tasks again, as far as one can say."""
        return self._recovery.retry_after_s(self._clock())

    @property
    def is_mending(self) -> bool:
        """Whether `mend` has something to do now, or may have before long."""
        return not self.is_ready or self._is_broken or self._is_left_alone

    def _received(self, event: StageEvent) -> Iterator[StageEvent]:
        """An event as the loop takes it. Streamed ports of which a task gave no rows are read from its payload."""
        if isinstance(event, StageRows) and event.request_id in self.tasks:
            self.tasks[event.request_id].discard(event.port)
        if isinstance(event, StageDone):
            self._num_failures = 0.0
            self._recovery.succeed()
            for port in sorted(self.tasks.get(event.request_id, ())):
                if port in event.payload.tensors:
                    yield StageRows(event.request_id, port, event.payload.tensors[port], is_last=True)
        if isinstance(event, StageDone | StageFailed):
            self.tasks.pop(event.request_id, None)
        if not isinstance(event, StageWorked):
            yield self._named(event) if isinstance(event, StageFailed) else event

    def _named(self, event: StageFailed) -> StageFailed:
        """The same failure, as an error of this stage."""
        cause = event.error if isinstance(event.error, Exception) else StageError(f"{event.error}")
        return dataclasses.replace(event, error=stage_error(self.name, cause))

    def _stuck(
        self,
        has_events: bool,
        activity: Activity,
        now: float,
        worker_timeout: float,
        is_waiting: Callable[[str], bool],
    ) -> list[StageEvent]:
        if not self.tasks:
            return []
        if activity is Activity.IDLE:
            self._quiet_since = None
            idle = [task for task in self.tasks if not is_waiting(task)]
            why = StageError("the engine has nothing to do, but has not finished this task")
            return self._fail(idle, why, is_lost=False)
        if activity is Activity.PENDING:
            self._quiet_since = None
        elif has_events or self._quiet_since is None:
            self._quiet_since = now
        elif now - self._quiet_since >= worker_timeout:
            silence_s = now - self._quiet_since
            words = f"no progress for {silence_s:.1f} s; raise scheduler.worker_timeout_s if it is just slow"
            return self._fail_all(StageError(words), is_lost=not self.executor.shares_memory)
        return []

    def _fail_all(self, error: Exception, is_lost: bool) -> list[StageEvent]:
        """All tasks fail, and the engine goes on if it can."""
        self._num_failures += FAILURE_OF_RETRIED if is_lost else 1.0
        failures = self._fail(self.tasks, error, is_lost)
        if is_out_of_memory(error):
            release_memory()
        try:
            if self._num_failures >= MAX_FAILURES or not self.executor.responds():
                self._break(error)
            else:
                self.executor.check_integrity()
        except Exception as broken:
            self._break(broken)
        return failures + self._give_up()

    def _silent_s(self) -> float:
        """Since the last answer of an engine that is at work."""
        quiet_since = self._quiet_since
        if quiet_since is None or not (self.tasks or self._is_left_alone):
            return 0.0
        return max(0.0, self._clock() - quiet_since)

    @property
    def _is_left_alone(self) -> bool:
        """Whether the engine is at work on tasks that are gone."""
        return not self.tasks and self._quiet_since is not None and self._is_stepping

    @property
    def _is_stepping(self) -> bool:
        """Whether the engine is still at work: on tasks that are gone, where there are none, and perhaps for ever."""
        try:
            return self.executor.activity() is Activity.STEPPING
        except Exception:
            return False

    @property
    def _is_broken(self) -> bool:
        return self._broken is not None or self.executor.breakdown() is not None

    @property
    def _cause(self) -> Exception | None:
        """Why the stage takes no tasks; None while it does."""
        return self._recovery.cause or self._broken or self.executor.breakdown()

    def _break(self, cause: Exception) -> None:
        """The engine is given up as soon as its tasks can be said to fail."""
        clear_frames(cause)
        self._broken = self._broken or cause

    def _give_up(self) -> list[StageEvent]:
        """Lets go of an engine that is broken: its tasks fail, and the stage will be rebuilt."""
        cause = self._cause
        if cause is None or not self.is_ready:
            return []
        failures = self._fail(self.tasks, cause, is_lost=True, is_blameless=self.executor.is_bystander)
        self.executor.shutdown(wait=False)
        self._broken, self._num_failures, self._quiet_since = None, 0.0, None
        self._recovery.begin(cause, self._clock())
        return failures

    def _fail(
        self, tasks: Iterable[str], cause: Exception, is_lost: bool, is_blameless: bool = False
    ) -> list[StageEvent]:
        made = {request_id: self.partial_result(request_id) for request_id in sorted(tasks)}
        for request_id in made:
            self.abort(request_id)
        error = stage_error(self.name, cause)
        return [StageFailed(request_id, error, each, is_lost, is_blameless) for request_id, each in made.items()]

    def _loading(self, go_on: Callable[[], None]) -> None:
        try:
            with stage_boundary(self.name):
                go_on()
        except BaseException:
            self.executor.shutdown()
            raise

    @contextmanager
    def _dropping(self, request_id: str) -> Iterator[None]:
        """A task whose engine raises over it is dropped."""
        try:
            yield
        except Exception as error:
            self.abort(request_id)
            raise stage_error(self.name, error) from error

    def _drop(self, request_id: str) -> None:
        try:
            self.executor.abort(request_id)
        except Exception as error:
            self._break(error)


def _collect_all() -> None:
    """Garbage also among what a server keeps from the collector; what is left of that is kept from it again."""
    was_kept = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if was_kept:
        gc.freeze()
