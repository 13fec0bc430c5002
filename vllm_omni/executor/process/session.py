"""One stage of a process that hosts some, from the first message about it to the last: its engine is loaded, served and
freed.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from torch import Tensor

from vllm_omni.engine.base import Activity, StageEngine, StageSpec
from vllm_omni.errors import StageError
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.hosting import Preparing, settle
from vllm_omni.executor.orders import Report, StageOrder
from vllm_omni.executor.process.connection import Connection
from vllm_omni.executor.process.device_tensors import DeviceTensors
from vllm_omni.executor.process.parcel import Export
from vllm_omni.executor.process.protocol import Loaded, LogLine, Surroundings, wire_types
from vllm_omni.executor.process.segments import Segments
from vllm_omni.executor.servant import StageServant
from vllm_omni.executor.wire.base import WireError
from vllm_omni.messages import StageTask
from vllm_omni.utils.device import is_cuda
from vllm_omni.utils.device_memory import CudaMemory, DeviceHandle
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

Log = Callable[[LogLine], None]


@dataclass(frozen=True, slots=True)
class Belongings:
    """What the stages of one process share."""

    background: Background
    log: Log
    models: ModelPool = field(default_factory=ModelPool)  # outlive the engines that read them
    segments: Segments = field(default_factory=Segments)
    exported: MutableMapping[DeviceHandle, Tensor] = field(default_factory=WeakValueDictionary)  # on a GPU


class Session:
    """Everything is done in the main thread, but for log lines, which any thread may send."""

    def __init__(self, number: int, end: socket.socket, belongings: Belongings) -> None:
        """number: in which it has come."""
        self.number = number
        self._connection = Connection(end, belongings.segments, wire_types())
        self._belongings = belongings
        self._sending = threading.Lock()
        self._is_settled = False
        self._spec: StageSpec | None = None
        self._engine: StageEngine | None = None
        self._servant: StageServant | None = None
        self._tensors: DeviceTensors | None = None  # of a stage on a GPU

    @property
    def has_ended(self) -> bool:
        """Nothing will be said any more, by either side."""
        return self._connection.is_closed

    def awaited(self) -> tuple[int, int]:
        """The descriptor for whose events it waits, and which these are; sends what has not been sent."""
        with self._sending:
            self._connection.flush()
        return self._connection.file, select.POLLIN | (select.POLLOUT if self._connection.has_unsent else 0)

    def has_work(self) -> bool:
        """Whether a turn would do something without an event."""
        return self._connection.has_frame or (self._servant is not None and self._servant.has_work())

    def turn(self, is_woken: bool) -> None:
        """Loads the engine when it is told which; then carries out orders, and makes one step where there is something
        to do. is_woken: by work beside an engine of this process. What ends it has been told to the parent.
        """
        self._connection.read()
        if self._connection.is_closed:
            self.end()
            return
        if self._servant is None:
            self._load()
        if self._servant is not None:
            self._serve(self._servant, is_woken)

    def end(self) -> None:
        """Frees the engine; the parent reads the last word before it sees the end."""
        with self._sending:
            self._connection.close()
        if self._engine is not None:
            self._engine.close()
        if self._spec is not None:
            self._spec.close()
        self._engine = self._spec = self._servant = None

    def log(self, line: LogLine) -> None:
        """From any thread; nothing where the parent is gone."""
        if not self._connection.is_closed:
            self._send(line)

    def _load(self) -> None:
        try:
            blueprint = self._told()
            if blueprint is None:
                return
            belongings = self._belongings
            num_before = len(belongings.models)
            self._spec = blueprint.describe()
            self._engine = blueprint.load(self._spec, belongings.background, belongings.models)
            self._tensors = device_tensors(blueprint, belongings.exported)
        except BaseException as error:
            self._send(Loaded(error))
            self.end()
            return
        self._send(Loaded(num_models=len(belongings.models) - num_before, modules=list(sys.modules)))
        self._servant = StageServant(blueprint.stage, self._engine, self._preparing(self._spec, blueprint))

    def _told(self) -> StageBlueprint | None:
        """What to load, once all of it has come."""
        if not self._is_settled:
            surroundings: Surroundings | None = self._connection.take()
            if surroundings is None:
                return None
            os.chdir(surroundings.folder)
            sys.path[:] = surroundings.sys_path
            settle(surroundings, self._belongings.log)
            self._connection.types = wire_types(surroundings.kinds)
            self._is_settled = True
        blueprint: StageBlueprint | None = self._connection.take()
        return blueprint

    def _preparing(self, spec: StageSpec, blueprint: StageBlueprint) -> Callable[[StageTask], StageTask]:
        prepare, tensors = Preparing(spec, blueprint), self._tensors
        return prepare if tensors is None else lambda task: prepare(tensors.fetch(task))

    def _serve(self, servant: StageServant, is_woken: bool) -> None:
        try:
            is_over = self._turn_of(servant, is_woken)
        except BaseException as error:  # such as SystemExit of a step
            ended = StageError(f"its process was ended by {type(error).__name__}: {error}")
            self._send(Report(0, Activity.IDLE.value, breakdown=ended))
            is_over = True
        if is_over:
            self.end()

    def _turn_of(self, servant: StageServant, is_woken: bool) -> bool:
        """Whether it was the last."""
        orders: list[StageOrder] = []
        while (order := self._connection.take()) is not None:
            orders.append(order)
        if not (orders or is_woken or servant.has_work()):
            return False
        news = servant.news()
        if news is not None:
            self._send(news)
        report = servant.turn(orders)
        orders.clear()  # the tensors of other processes that they brought are copied, and can be returned
        try:
            self._send(report, None if self._tensors is None else self._tensors.exporter(report))
        except WireError as error:
            self._send(servant.unsent(report, error))
        return report.breakdown is not None

    def _send(self, message: object, export: Export | None = None) -> None:
        """Waits for a parent that reads slowly: it is to be no further ahead than what the socket holds. export: as of
        Connection.send.
        """
        with self._sending:
            if export is None:
                self._connection.send(message)
            else:
                self._connection.send(message, export)
            while self._connection.has_unsent and not self._connection.is_closed:
                ready({self._connection.file: select.POLLOUT})
                self._connection.flush()


def device_tensors(
    blueprint: StageBlueprint, exported: MutableMapping[DeviceHandle, Tensor] | None = None
) -> DeviceTensors | None:
    """None for a stage whose tensors all pass through the host's memory, as where there is no driver of CUDA."""
    memory = CudaMemory.find(blueprint.device) if is_cuda(blueprint.device) else None
    return None if memory is None else DeviceTensors(blueprint.stays_on_device, memory, exported)


def ready(events: Mapping[int, int], *, wait: bool = True) -> set[int]:
    """Waits for one of these events of descriptors, and gives those that have some. Not by `select.select`, which knows
    none from 1024 on: ours have the number that they have in a parent with many connections.
    """
    poll = select.poll()
    for file, asked in events.items():
        poll.register(file, asked)
    return {file for file, _ in poll.poll(None if wait else 0)}
