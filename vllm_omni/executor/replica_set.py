"""One stage as the loop sees it: its replicas, which task is where, and what was streamed to it.

Owns the stage's tasks from `submit` until they end, so that one whose engine breaks can be run again. Each replica has
a StageHost, which guards its engine. Knows no other stage and no request as a whole.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from vllm_omni.core.routing.replica_router import ReplicaRouter
from vllm_omni.core.routing.retries import Retries
from vllm_omni.engine.boundary import stage_error
from vllm_omni.errors import StageError, StageUnavailableError
from vllm_omni.executor.base import StageExecutor
from vllm_omni.executor.replay import Replay
from vllm_omni.executor.replica_status import merged_stats, merged_status
from vllm_omni.executor.rolling_restart import RollingRestart
from vllm_omni.executor.row_buffers import RowBuffers
from vllm_omni.executor.stage_host import StageHost
from vllm_omni.messages import ChunkConsumed, StageDone, StageEvent, StageFailed, StageProgress, StageRows, StageTask
from vllm_omni.payload import PortSpec, RowRange, StagePayload, StreamChunk

TOLD = StageProgress | StageRows | ChunkConsumed | StageDone | StageFailed

logger = logging.getLogger(__name__)


class ReplicaSet:
    """The replicas of one stage, of which there may be one. build: makes the executor of a replica, not started.

    A task whose engine breaks is run again on a replica that is ready, or as soon as one is. It ends with the cause
    where that is not possible, has not helped, or would show (see Replay and Retries), and when a rebuild fails.
    """

    def __init__(
        self,
        name: str,
        num_replicas: int,
        build: Callable[[int], StageExecutor],
        inputs: Mapping[str, PortSpec],
        streamed_ports: Collection[str],
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.tasks: dict[str, Replay] = {}
        self._streamed_ports = frozenset(streamed_ports)
        self.hosts: Sequence[StageHost] = [
            StageHost(name, partial(build, number), self._streamed_ports, clock) for number in range(num_replicas)
        ]
        self._router = ReplicaRouter(num_replicas)
        self._retries = Retries()
        self._restart = RollingRestart(self.hosts)
        self._rows = RowBuffers(inputs)
        self._replica_of: dict[str, int] = {}
        self._waiting: dict[str, StageError | None] = {}  # tasks that are nowhere -> why they were lost
        self._failures: list[StageEvent] = []  # for the next poll
        self._is_shut_down = False

    def load(self) -> None:
        """Begins to load all replicas. Those of this process are loaded when this returns, one after another: libraries
        that import lazily do not stand two threads.
        """
        for host in self.hosts:
            host.load()
            if host.executor.shares_memory:
                host.ensure_loaded()

    def ensure_loaded(self) -> None:
        """Waits for all of them; raises what loading raised."""
        for host in self.hosts:
            host.ensure_loaded()

    def ensure_ready(self) -> None:
        """StageUnavailableError while no replica could take a task, unless one is being restarted."""
        if any(host.takes_tasks or host.is_planned for host in self.hosts):
            return
        min(self.hosts, key=lambda host: host.retry_after_s).ensure_ready()

    def mend(self, worker_timeout: float) -> None:
        """Goes on with rebuilds and restarts, and begins tasks that have waited for one. Never waits for a thread."""
        for host in self.hosts:
            host.mend(worker_timeout)
        if not self._is_shut_down:
            restarted = self._restart.go_on()
            if restarted is not None:
                self._router.forget(restarted)
            self._begin_waiting()

    def restart(self) -> None:
        """Begins to restart the replicas one after another, each once its tasks have finished; `mend` goes on."""
        self._restart.begin()

    def shutdown(self) -> None:
        """Frees the engines for good; may be called twice."""
        self._is_shut_down = True
        for host in self.hosts:
            host.shutdown()

    def submit(self, task: StageTask, is_watched: bool) -> Mapping[str, Any]:
        """Takes a task: what its inputs are, chunks cut. It begins on a replica, or waits for one. StageError, and the
        task is dropped, when that fails. is_watched: as of the StageTask that the replica is given.
        """
        inputs = self._rows.cut_inputs(task.request_id, task.inputs)
        replay = Replay(dataclasses.replace(task, inputs=inputs, is_watched=is_watched), self._streamed_ports)
        if all(host.is_hopeless for host in self.hosts):
            self.ensure_ready()
        self.tasks[task.request_id] = replay
        self._waiting[task.request_id] = None
        self._begin(task.request_id)
        return inputs

    def feed(self, request_id: str, port: str, rows: RowRange) -> StreamChunk | None:
        """Cuts a chunk and hands it over, where the task is still there; StageError, and the task is dropped, when that
        fails.
        """
        if request_id not in self.tasks:
            return None
        chunk = self._rows.cut(request_id, port, rows)
        self.tasks[request_id].fed(port, chunk)
        self._tell(request_id, lambda host: host.feed(request_id, port, chunk))
        return chunk

    def pause(self, request_id: str) -> None:
        """Where the task is still there; StageError, and the task is dropped, when that fails."""
        if request_id in self.tasks:
            self.tasks[request_id].is_paused = True
            self._tell(request_id, lambda host: host.pause(request_id))

    def resume(self, request_id: str) -> None:
        """As `pause`."""
        if request_id in self.tasks:
            self.tasks[request_id].is_paused = False
            self._tell(request_id, lambda host: host.resume(request_id))

    def keep_rows(self, request_id: str, port: str, rows: Tensor) -> None:
        """New rows [n, ...] of a streamed input, from which chunks will be cut; StageError for misshapen ones."""
        self._rows.push(request_id, port, rows)

    def compact_rows(self) -> None:
        """Lets go of large tensors of which only a few rows are kept."""
        self._rows.compact()

    def poll(self, worker_timeout: float, is_waiting: Callable[[str], bool]) -> list[StageEvent]:
        """What the stage reports, of a task that was run again only what is new; otherwise as StageHost.poll."""
        events: list[StageEvent] = []
        for replica, host in enumerate(self.hosts):
            lost: list[StageFailed] = []
            for event in host.poll(worker_timeout, is_waiting):
                if isinstance(event, StageFailed) and event.is_lost and event.request_id in self.tasks:
                    lost.append(event)
                else:
                    events += self._received(event)
            if lost:
                events += self._lost(replica, lost)
        failures, self._failures = self._failures, []
        return events + failures

    def hold(self) -> None:
        """It is not stepped for now; its silence meanwhile is not its own."""
        for host in self.hosts:
            host.hold()

    def is_busy(self) -> bool:
        """Whether a poll would do something."""
        return bool(self._failures) or self._could_begin or any(host.is_busy() for host in self.hosts)

    def partial_result(self, request_id: str) -> StagePayload | None:
        """What a task has made so far; None where the engine does not say."""
        replay = self.tasks.get(request_id)
        if replay is None or not replay.has_caught_up:
            return None if replay is None else replay.made
        host = self._host_of(request_id)
        return None if host is None else host.partial_result(request_id)

    def save_state(self, request_id: str) -> Mapping[str, Any] | None:
        """What of a task is needed to go on with it later; None where it is not here, or that is nothing. StageError
        where the engine cannot say.
        """
        host = self._host_of(request_id)
        return None if host is None else host.save_state(request_id)

    def abort(self, request_id: str) -> None:
        """Drops a task and the rows that are kept for it; unknown ones are fine."""
        host = self._host_of(request_id)
        self._forget(request_id)
        if host is not None:
            host.abort(request_id)

    def check_integrity(self) -> None:
        """Raises what an engine finds wrong with itself, and StageError when a task is in no place, or in two."""
        for host in self.hosts:
            host.check_integrity()
        self._router.check_integrity()
        places = sorted([*self._waiting, *(task for host in self.hosts for task in host.tasks)])
        if places != sorted(self.tasks) or self._replica_of.keys() | self._waiting.keys() != self.tasks.keys():
            raise StageError(f"stage {self.name!r}: tasks are in {places}, expected {sorted(self.tasks)}")
        if self._retries.num_known > len(self.tasks):
            raise StageError(f"stage {self.name!r}: knows {self._retries.num_known} lost tasks of {len(self.tasks)}")

    def get_status(self, worker_timeout: float) -> dict[str, Any]:
        """Gauges; safe to call from another thread. Those of StageHost, over all replicas; waiting: tasks that no
        replica has; num_retries: runs of lost tasks that began again; num_to_restart: replicas that a restart has yet
        to bring back; replicas: of each its own, and the work that is outstanding there.
        """
        replicas = [
            {**host.get_status(worker_timeout), "outstanding": self._router.outstanding(number)}
            for number, host in enumerate(self.hosts)
        ]
        if self._restart.replica is not None and replicas[self._restart.replica]["state"] == "ready":
            replicas[self._restart.replica]["state"] = "draining"
        counts = {"tasks": len(self.tasks), "waiting": len(self._waiting), "num_retries": self._retries.total}
        return {**merged_status(replicas), **counts, "num_to_restart": self._restart.num_left, "replicas": replicas}

    def get_stats(self) -> Mapping[str, Any]:
        """As StageEngine.get_stats, counts being those of all replicas together; of several also each one's own."""
        return merged_stats([host.executor.get_stats() for host in self.hosts])

    @property
    def num_models(self) -> int:
        """That its replicas have loaded in other processes."""
        return sum(host.executor.num_models for host in self.hosts)

    @property
    def is_ready(self) -> bool:
        """Whether some replica has an engine."""
        return any(host.is_ready for host in self.hosts)

    @property
    def is_apart(self) -> bool:
        """Whether its engines are in other processes."""
        return not self.hosts[0].executor.shares_memory

    @property
    def is_mending(self) -> bool:
        """Whether `mend` has something to do now, or may have before long."""
        return self._restart.num_left > 0 or any(host.is_mending for host in self.hosts)

    @property
    def num_buffers(self) -> int:
        """Streamed inputs of which rows are kept."""
        return len(self._rows)

    def _begin_waiting(self) -> None:
        """Gives waiting tasks to replicas that are ready; all of them end where rebuilding has failed everywhere."""
        for number, host in enumerate(self.hosts):
            self._router.set_open(number, host.takes_tasks and number != self._restart.replica)
        is_hopeless = all(host.is_hopeless for host in self.hosts)
        for request_id, why in list(self._waiting.items()):
            made = self.tasks[request_id].made
            try:
                if is_hopeless:
                    self._forget(request_id)
                    raise why or self._unavailable()
                self._begin(request_id)
            except StageError as error:
                self._failures.append(StageFailed(request_id, error, made))

    def _begin(self, request_id: str) -> None:
        """Gives a waiting task to a replica, where there is one for it. StageError, and the task is dropped, where its
        engine refuses it.
        """
        replica = self._choose(request_id)
        if replica is None:
            return
        replay = self.tasks[request_id]
        del self._waiting[request_id]
        self._replica_of[request_id] = replica
        self._retries.begin(request_id, replica)
        self._tell(request_id, lambda host: host.submit(replay.task))
        for port, chunk in replay.chunks:
            self._tell(request_id, partial(StageHost.feed, request_id=request_id, port=port, chunk=chunk))
        if replay.is_paused:
            self._tell(request_id, lambda host: host.pause(request_id))

    def _choose(self, request_id: str) -> int | None:
        task = self.tasks[request_id].task
        while True:
            replica = self._router.assign(request_id, task.size, task.prefixes, self._retries.closed_to(request_id))
            if replica is None or (self.hosts[replica].takes_tasks and replica != self._restart.replica):
                return replica
            self._router.finish(request_id)
            self._router.set_open(replica, False)

    def _tell(self, request_id: str, say: Callable[[StageHost], object]) -> None:
        """Tells the replica that has a task; StageError, and the task is dropped, where it refuses. Where it broke over
        that, the task is lost like the others there.
        """
        replica = self._replica_of.get(request_id)
        if replica is None:
            return
        try:
            say(self.hosts[replica])
        except StageError as error:
            if self.hosts[replica].takes_tasks:
                self._forget(request_id)
                raise
            is_blameless = self.hosts[replica].executor.is_bystander
            lost = StageFailed(request_id, error, is_lost=True, is_blameless=is_blameless)
            self._failures += self._lost(replica, [lost])

    def _received(self, event: StageEvent) -> list[StageEvent]:
        """What of an event is new. One that tells something else than before, or is no event, ends its task."""
        replay = self.tasks.get(event.request_id) if isinstance(event, TOLD) else None
        if replay is None:
            return [event]
        request_id = replay.request_id
        try:
            new = replay.receive(event)
            num_retries = self._retries.count(request_id)
            if num_retries and isinstance(new, StageDone):
                new = dataclasses.replace(new, metrics={**new.metrics, "retried": num_retries})
        except Exception as error:
            self.abort(request_id)
            return [StageFailed(request_id, stage_error(self.name, error), replay.made)]
        if replay.has_caught_up:
            self._retries.acquit(request_id)
        if isinstance(event, StageDone | StageFailed):
            self._forget(request_id)
        return [] if new is None else [new]

    def _lost(self, replica: int, lost: Sequence[StageFailed]) -> list[StageEvent]:
        """The engine of a replica broke over these tasks, at least one: some wait to be run again, others failed."""
        if not self.hosts[replica].takes_tasks:
            self._router.forget(replica)
        able = {event.request_id for event in lost if self.tasks[event.request_id].can_run_again}
        again = set() if self._is_shut_down else self._to_run_again(replica, able, lost)
        failures: list[StageEvent] = []
        for event in lost:
            request_id, replay = event.request_id, self.tasks[event.request_id]
            replay.lose(event.made)
            if request_id in again:
                self._router.finish(request_id)
                del self._replica_of[request_id]
                self._waiting[request_id] = event.error if isinstance(event.error, StageError) else None
            else:
                self._forget(request_id)
                failures.append(dataclasses.replace(event, made=replay.made))
        if again:
            logger.warning("%d tasks will be run again: %s", len(again), lost[0].error)
        return failures

    def _to_run_again(self, replica: int, able: set[str], lost: Sequence[StageFailed]) -> set[str]:
        if not all(event.is_blameless for event in lost):
            return self._retries.lose(replica, able)
        self._retries.excuse(replica, able)
        return able

    def _forget(self, request_id: str) -> None:
        """Nothing is kept of a task any more."""
        self.tasks.pop(request_id, None)
        self._waiting.pop(request_id, None)
        self._replica_of.pop(request_id, None)
        self._router.finish(request_id)
        self._retries.end(request_id)
        self._rows.drop(request_id)

    def _host_of(self, request_id: str) -> StageHost | None:
        replica = self._replica_of.get(request_id)
        return None if replica is None else self.hosts[replica]

    def _unavailable(self) -> StageError:
        try:
            self.ensure_ready()
        except StageUnavailableError as error:
            return error
        return StageError(f"stage {self.name!r} could not be rebuilt")

    @property
    def _could_begin(self) -> bool:
        """Whether `mend` would begin a waiting task."""
        if not self._waiting:
            return False
        ready = {number for number, host in enumerate(self.hosts) if host.takes_tasks}
        ready.discard(-1 if self._restart.replica is None else self._restart.replica)
        return any(ready.difference(self._retries.closed_to(task)) for task in self._waiting)
