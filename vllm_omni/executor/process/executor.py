"""The parent's half of a stage in another process, its own or one that stages share: a crash, a hang or a lack of
memory there is theirs alone.

Orders go out and reports come in without waiting. Tensors pass through memory that both processes map: on the CPU one
copy into it and none out of it, or none at all where they lie in such memory already. Tensors of an accelerator pass
through the CPU's memory, or stay there where all that read them are processes on the same one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from vllm_omni.engine.base import Activity, EngineContext, StageSpec
from vllm_omni.errors import StageError
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.homes import home_of, is_forked
from vllm_omni.executor.orders import Report, StageOrder
from vllm_omni.executor.process.connection import Connection
from vllm_omni.executor.process.hosts import LOOK_S, STOPPED_S, Host
from vllm_omni.executor.process.protocol import Loaded, LogLine, Surroundings, wire_types
from vllm_omni.executor.served import ServedExecutor
from vllm_omni.executor.wire.base import WireError
from vllm_omni.utils.children.fork_client import learn


class ProcessExecutor(ServedExecutor):
    """Joins the process that hosts it, and leaves it. All that the child needs is the blueprint.

    A child that ended, was stopped or shows no sign of life is a breakdown, as is one that sends what is no message.
    """

    shares_memory = False

    def __init__(self, spec: StageSpec, context: EngineContext, commons: Commons, blueprint: StageBlueprint) -> None:
        super().__init__(spec, context, commons, blueprint)
        self._segments = commons.segments
        self._hosts = commons.hosts
        self._name = spec.stage.name
        self._host: Host | None = None
        self._number = 0  # by which the host knows it
        self._connection: Connection | None = None
        self._is_loaded = False
        self._load_error: BaseException | None = None
        self._is_beyond = False  # its process can be of no more use
        self._is_watched_for_writing: bool | None = None  # None: its connection is not watched
        self._closed_s: float | None = None  # when it closed its connection

    def start(self) -> None:
        with self._lock:
            if self._host is None and self._breakdown is None:
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
            host, connection = self._host, self._connection
            if host is None or connection is None:
                return
            self._forget()
            connection.close()  # which tells the child to free the engine
            self._connection = None
            why = f"was ended over its stage {self._name!r}" if self._needs_kill(wait) else None
            self._hosts.leave(host, wait=wait, kill=why)

    def activity(self) -> Activity:
        """While another stage of its process is at work, it is not this one that keeps the loop waiting."""
        with self._lock:
            found, host = super().activity(), self._host
            if found is not Activity.STEPPING or host is None or self._connection is None:
                return found
            return Activity.PENDING if host.is_turn_of_another(self._number) else found

    def place(self) -> Mapping[str, Any]:
        return {"pid": None if self._host is None else self._host.pid}

    def _needs_kill(self, wait: bool) -> bool:
        """Whether its process would not hear that the stage is gone; it does after a breakdown that it told itself."""
        assert self._host is not None
        if self._is_beyond or (not self._is_loaded and self._load_error is None):
            return True
        is_at_work = self._num_done < self._num_sent or self._activity is Activity.BUSY
        return not wait and self._breakdown is None and is_at_work and self._host.is_turn_of(self._number)

    def _start(self) -> None:
        stage = self._spec.stage
        home = home_of(stage, self._context.replica)
        assert home is not None
        imports = self._spec.imports if is_forked(stage, self._blueprint.config.stages.values()) else None
        self._host = self._hosts.join(home, self._wake, imports)
        self._number, end = self._host.connect()
        self._connection = Connection(end, self._segments, wire_types())
        surroundings = Surroundings.of(self._blueprint.config)
        self._connection.send(surroundings)
        self._connection.types = wire_types(surroundings.kinds)
        self._connection.send(self._blueprint)
        self._watch()

    def _send(self, order: StageOrder) -> None:
        if self._connection is None:
            raise StageError(f"stage {self._name!r}: not started, or shut down")
        self._connection.send(self._portable(order))
        self._watch()

    def _receive(self) -> list[Report]:
        if self._connection is None or self._breakdown is not None:
            return []
        reports: list[Report] = []
        has_ended = self._host is not None and self._host.has_ended  # first, so that its last words are heard
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
        host, connection = self._host, self._connection
        assert host is not None and connection is not None
        if self._breakdown is not None:
            return
        if has_ended:
            self._broken_by(host.end())
        elif connection.is_closed:
            now = time.monotonic()
            self._closed_s = self._closed_s or now
            if now - self._closed_s > STOPPED_S:
                self._broken_by("closed its connection")
        elif (trouble := host.trouble(is_loading=not self._is_loaded)) is not None:
            self._broken_by(trouble)

    def _broken_by(self, what: str, cause: Exception | None = None) -> None:
        host = self._host
        self.is_bystander = host is not None and host.is_turn_of_another(self._number)
        pid = None if host is None else host.pid
        error = StageError(f"its process {pid} {what}")
        error.__cause__ = cause
        self._is_beyond = True
        self._breakdown = self._breakdown or error
        self._activity = Activity.IDLE
        self._forget()
