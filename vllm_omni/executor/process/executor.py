"""The parent's half of a stage in a process of its own: a crash, a hang or a lack of memory there is the stage's alone.

Orders go out and reports come in without waiting. Tensors pass through memory that both processes map: on the CPU one
copy into it and none out of it, or none at all where they lie in such memory already. Tensors of an accelerator pass
through the CPU's memory, or stay there where all that read them are processes on the same one.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from typing import Any

from vllm_omni.engine.base import Activity, EngineContext, StageSpec
from vllm_omni.errors import StageError
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.orders import Report, StageOrder, Submit
from vllm_omni.executor.process.connection import Connection
from vllm_omni.executor.process.keeper import Keeper
from vllm_omni.executor.process.protocol import Loaded, LogLine, Surroundings, wire_types
from vllm_omni.executor.process.pulse import NUM_BYTES, Pulse
from vllm_omni.executor.process.segments import create_memory
from vllm_omni.executor.served import ServedExecutor
from vllm_omni.executor.wire.base import WireError
from vllm_omni.utils.children.fork_client import learn
from vllm_omni.utils.device import is_cpu
from vllm_omni.utils.processes import is_stopped

LEAVE_S = 5.0  # the most that is waited for a child to free its engine and end
KILL_S = 2.0  # ... for one that was killed
STOPPED_S = 0.5  # without a sign of life, after which one that is stopped counts as hanging
SILENT_S = 10.0  # ... after which any does; on a machine that is busy threads wait for each other
IMPORT_S = 60.0  # ... while it loads, when large libraries are read from a slow disk
LOOK_S = 0.1  # between two looks at it


class ProcessExecutor(ServedExecutor):
    """Starts the process, and ends it. All that the child needs is the blueprint.

    A child that ended, was stopped or shows no sign of life is a breakdown, as is one that sends what is no message.
    """

    shares_memory = False

    def __init__(self, spec: StageSpec, context: EngineContext, commons: Commons, blueprint: StageBlueprint) -> None:
        super().__init__(spec, context, commons, blueprint)
        self._segments = commons.segments
        self._name = spec.stage.name
        self._keeper: Keeper | None = None
        self._connection: Connection | None = None
        self._pulse: Pulse | None = None
        self._is_loaded = False
        self._load_error: BaseException | None = None
        self._is_watched_for_writing: bool | None = None  # None: its connection is not watched
        self._started_s = self._looked_s = 0.0
        self._closed_s: float | None = None  # when it closed its connection

    def start(self) -> None:
        with self._lock:
            if self._keeper is None and self._breakdown is None:
                self._start()

    def is_loaded(self) -> bool:
        with self._lock:
            self._collect()
            if self._load_error is not None:
                raise self._load_error
            if not self._is_loaded and self._breakdown is not None:
                raise self._breakdown
            return self._is_loaded

    def ensure_loaded(self) -> None:
        while not self.is_loaded():
            self._wake.wait(LOOK_S)

    def shutdown(self, *, wait: bool = True) -> None:
        with self._lock:
            keeper, connection = self._keeper, self._connection
            if keeper is None or connection is None:
                return
            self._forget()
            connection.close()  # which tells the child to leave
            if not wait or not self._is_loaded or self._breakdown is not None or not keeper.wait(LEAVE_S):
                keeper.kill()
            if wait:
                keeper.wait(KILL_S)
            self._connection = None
            if self._pulse is not None:
                self._pulse.close()

    def place(self) -> Mapping[str, Any]:
        return {"pid": None if self._keeper is None else self._keeper.pid}

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pulse = create_memory(NUM_BYTES)
        self._pulse = Pulse(pulse)
        self._started_s = time.monotonic()
        self._connection = Connection(ours, self._segments, wire_types())
        forks = is_cpu(self._blueprint.device)
        self._keeper = Keeper(self._name, [theirs.detach(), pulse], self._wake, forks=forks)
        surroundings = Surroundings.of(self._blueprint.config)
        self._connection.send(surroundings)
        self._connection.types = wire_types(surroundings.kinds)
        self._connection.send(self._blueprint)
        self._watch()

    def _send(self, order: StageOrder) -> None:
        if self._connection is None:
            raise StageError(f"stage {self._name!r}: not started, or shut down")
        self._connection.send(order.for_another_process() if isinstance(order, Submit) else order)
        self._watch()

    def _receive(self) -> list[Report]:
        if self._connection is None or self._breakdown is not None:
            return []
        reports: list[Report] = []
        has_ended = self._keeper is not None and self._keeper.has_ended  # first, so that its last words are heard
        try:
            for message in self._connection.receive():
                if isinstance(message, Report):
                    reports.append(message)
                elif isinstance(message, Loaded):
                    self.num_models = message.num_models
                    self._is_loaded, self._load_error = message.error is None, message.error
                    learn(message.modules)
                elif isinstance(message, LogLine):
                    logging.getLogger(message.logger).log(message.level, "%s: %s", self._name, message.text)
                else:
                    raise WireError(f"got a {type(message).__name__} from it, expected a report")
            self._connection.flush()
            self._watch()
        except WireError as error:
            self._broken_by(f"sent what is no message: {error}", error)
        self._look(has_ended)
        return reports

    def _wait_for_report(self, timeout_s: float) -> None:
        self._wake.wait(min(timeout_s, LOOK_S))

    def _watch(self) -> None:
        connection = self._connection
        if connection is None or connection.is_closed:
            self._forget()
        elif self._is_watched_for_writing is not connection.has_unsent:
            self._is_watched_for_writing = connection.has_unsent
            self._wake.watch(connection.file, self._take_in_all, for_writing=connection.has_unsent)

    def _forget(self) -> None:
        if self._connection is not None and self._is_watched_for_writing is not None:
            self._wake.forget(self._connection.file)
        self._is_watched_for_writing = None

    def _take_in_all(self) -> None:
        with self._lock:
            self._collect()

    def _look(self, has_ended: bool) -> None:
        """Whether the child lives and moves."""
        keeper, pulse, connection = self._keeper, self._pulse, self._connection
        assert keeper is not None and pulse is not None and connection is not None
        if self._breakdown is not None:
            return
        if has_ended:
            self._broken_by(keeper.end())
            return
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        if connection.is_closed:
            self._closed_s = self._closed_s or now
            if now - self._closed_s > STOPPED_S:
                self._broken_by("closed its connection")
            return
        silent_s = min(pulse.silent_s(), now - self._started_s)
        if silent_s > STOPPED_S and keeper.pid is not None and is_stopped(keeper.pid):
            self._broken_by(f"was stopped, and gave no sign of life for {silent_s:.1f} s")
        elif silent_s > (SILENT_S if self._is_loaded else IMPORT_S):
            self._broken_by(f"gave no sign of life for {silent_s:.1f} s")

    def _broken_by(self, what: str, cause: Exception | None = None) -> None:
        pid = None if self._keeper is None else self._keeper.pid
        error = StageError(f"its process {pid} {what}")
        error.__cause__ = cause
        self._breakdown = self._breakdown or error
        self._activity = Activity.IDLE
        self._forget()
