"""The guard of one stage: what its engine does wrong becomes a failure of the tasks it holds, never of the loop.

Owns the stage's tasks and the rows that were streamed to it. Knows since when it is silent; not what comes before or
after the stage, nor who is paused.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vllm_omni.engine.base import Activity
from vllm_omni.engine.boundary import describe, stage_error
from vllm_omni.errors import StageError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.executor.row_buffer import RowBuffer
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageRows, StageTask, StageWorked
from vllm_omni.payload import PortSpec, RowRange, StreamChunk, TensorSpec

MAX_RAISES = 2


class StageHost:
    """One stage, its executor and its tasks.

    An engine that raises from `step` loses its tasks and goes on; raising twice without a finished task in between, or
    being unable to drop the tasks cleanly, marks the stage dead: new tasks then fail.
    """

    def __init__(
        self,
        name: str,
        executor: StageExecutor,
        inputs: Mapping[str, PortSpec],
        streamed_ports: Collection[str],
    ) -> None:
        self.name = name
        self.executor = executor
        self.tasks: dict[str, set[str]] = {}  # request id -> the ports below of which it has given no row yet
        self.cause_of_death: Exception | None = None
        self._inputs = inputs
        self._streamed_ports = frozenset(streamed_ports)  # outputs that another stage reads row by row
        self._buffers: dict[tuple[str, str], RowBuffer] = {}  # (request id, input port)
        self._num_raises = 0
        self._quiet_since: float | None = None

    def ensure_alive(self) -> None:
        """StageError when the stage is dead."""
        if self.cause_of_death is not None:
            message = f"stage {self.name!r} is dead since it raised {describe(self.cause_of_death)}; make a new Omni"
            raise StageError(message) from self.cause_of_death

    def submit(self, task: StageTask) -> Mapping[str, Any]:
        """Hands a task over: what its inputs are, chunks cut. StageError, and the task is lost, when that fails."""
        self.ensure_alive()
        if not self.tasks:
            self._quiet_since = None
        self.tasks[task.request_id] = set(self._streamed_ports)
        with self._losing(task.request_id):
            inputs = {port: self._input(task.request_id, port, value) for port, value in task.inputs.items()}
            self.executor.submit(dataclasses.replace(task, inputs=inputs))
        return inputs

    def feed(self, request_id: str, port: str, rows: RowRange) -> StreamChunk | None:
        """Cuts a chunk and hands it over, where the task is still there; StageError, and the task is lost, when that
        fails.
        """
        if request_id not in self.tasks:
            return None
        with self._losing(request_id):
            chunk = self._buffer(request_id, port).cut(rows)
            self.executor.feed(request_id, port, chunk)
        return chunk

    def pause(self, request_id: str) -> None:
        """Where the task is still there; StageError, and the task is lost, when that fails."""
        if request_id in self.tasks:
            with self._losing(request_id):
                self.executor.pause(request_id)

    def resume(self, request_id: str) -> None:
        """As `pause`."""
        if request_id in self.tasks:
            with self._losing(request_id):
                self.executor.resume(request_id)

    def keep_rows(self, request_id: str, port: str, rows: Tensor) -> None:
        """New rows [n, ...] of a streamed input, from which chunks will be cut; StageError for misshapen ones."""
        self._buffer(request_id, port).push(rows)

    def compact_rows(self) -> None:
        """Lets go of large tensors of which only a few rows are kept."""
        for buffer in self._buffers.values():
            buffer.compact()

    def poll(self, now: float, worker_timeout: float, is_waiting: Callable[[str], bool]) -> list[StageEvent]:
        """What the stage reports. Failures carry a StageError; a raise, or being stuck, fails all tasks.

        Stuck is a stage that reports nothing for `worker_timeout` seconds after a step that reported nothing, or one
        that has nothing to do and yet holds tasks. is_waiting: whether a task is paused or will be given more chunks.
        """
        if not self.tasks:
            return []
        try:
            reported = self.executor.poll()
            events = [event for found in reported for event in self._received(found)]
            activity = self.executor.activity()
        except Exception as error:
            return self._break(error)
        return events + self._stuck(bool(reported), activity, now, worker_timeout, is_waiting)

    def hold(self) -> None:
        """It is not stepped for now; its silence meanwhile is not its own."""
        self._quiet_since = None

    def is_busy(self) -> bool:
        """Whether a poll would do something. Also of a stage that cannot say: what is wrong shows when it is polled."""
        try:
            return bool(self.tasks) and self.executor.activity() is Activity.BUSY
        except Exception:
            return True

    def abort(self, request_id: str) -> None:
        """Drops a task and the rows that are kept for it; unknown ones are fine."""
        if self._end(request_id):
            self._drop(request_id)

    def check_integrity(self) -> None:
        """Raises what the engine finds wrong with itself."""
        if self.cause_of_death is None:
            self.executor.check_integrity()

    @property
    def num_buffers(self) -> int:
        """Streamed inputs of which rows are kept."""
        return len(self._buffers)

    def _input(self, request_id: str, port: str, value: Any) -> Any:
        return self._buffer(request_id, port).cut(value) if isinstance(value, RowRange) else value

    def _buffer(self, request_id: str, port: str) -> RowBuffer:
        """Of a streamed input; of one that ends without a row it is made when its one chunk is cut."""
        spec = self._inputs[port]
        shape = spec.row_shape if isinstance(spec, TensorSpec) else ()
        return self._buffers.setdefault((request_id, port), RowBuffer(shape))

    def _received(self, event: StageEvent) -> Iterator[StageEvent]:
        """An event as the loop takes it. Streamed ports of which a task gave no rows are read from its payload."""
        if isinstance(event, StageRows) and event.request_id in self.tasks:
            self.tasks[event.request_id].discard(event.port)
        if isinstance(event, StageDone):
            self._num_raises = 0
            for port in sorted(self.tasks.get(event.request_id, ())):
                if port in event.payload.tensors:
                    yield StageRows(event.request_id, port, event.payload.tensors[port], is_last=True)
        if isinstance(event, StageDone | StageFailed):
            self._end(event.request_id)
        if not isinstance(event, StageWorked):
            yield self._named(event) if isinstance(event, StageFailed) else event

    def _named(self, event: StageFailed) -> StageFailed:
        """The same failure, as an error of this stage."""
        cause = event.error if isinstance(event.error, Exception) else StageError(f"{event.error}")
        return StageFailed(event.request_id, stage_error(self.name, cause))

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

    def _end(self, request_id: str) -> bool:
        """Nothing is kept for a task any more; whether the stage held it."""
        for key in [key for key in self._buffers if key[0] == request_id]:
            del self._buffers[key]
        return self.tasks.pop(request_id, None) is not None

    def _drop(self, request_id: str) -> None:
        try:
            self.executor.abort(request_id)
        except Exception as error:
            self._die(error)

    def _die(self, cause: Exception) -> None:
        traceback.clear_frames(cause.__traceback__)
        self.cause_of_death = self.cause_of_death or cause
