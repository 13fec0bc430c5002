"""What the process of a stage does from its first message to its last: loads the engine, serves it, leaves."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from vllm_omni.engine.base import Activity, StageSpec
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
from vllm_omni.utils.device_memory import CudaMemory
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool


class Service:
    """Everything is done in the main thread, but for log lines, which any thread may send."""

    def __init__(self, end: socket.socket) -> None:
        self._connection = Connection(end, Segments(), wire_types())
        self._sending = threading.Lock()
        self._tensors: DeviceTensors | None = None  # of a stage on a GPU
        self._waking, self._wakes = os.pipe()
        os.set_blocking(self._waking, False)
        os.set_blocking(self._wakes, False)

    def run(self) -> None:
        """Returns when the parent says so or is gone; whatever else ends it has been told to the parent."""
        try:
            blueprint = self._set_up()
            background = Background(self._wake)
            spec = blueprint.describe()
            models = ModelPool()
            engine = blueprint.load(spec, background, models)
        except _PartedError:
            return
        except BaseException as error:
            self._send(Loaded(error))
            self._finish()
            return
        self._send(Loaded(num_models=len(models), modules=list(sys.modules)))
        self._tensors = device_tensors(blueprint)
        try:
            self._serve(StageServant(blueprint.stage, engine, self._preparing(spec, blueprint)))
        except _PartedError:
            pass
        except BaseException as error:  # such as SystemExit of a step
            ended = StageError(f"its process was ended by {type(error).__name__}: {error}")
            self._send(Report(0, Activity.IDLE.value, breakdown=ended))
        engine.close()
        background.shutdown()
        spec.close()
        self._finish()

    def _preparing(self, spec: StageSpec, blueprint: StageBlueprint) -> Callable[[StageTask], StageTask]:
        prepare, tensors = Preparing(spec, blueprint), self._tensors
        return prepare if tensors is None else lambda task: prepare(tensors.fetch(task))

    def _set_up(self) -> StageBlueprint:
        surroundings: Surroundings = self._next()
        os.chdir(surroundings.folder)
        sys.path[:] = surroundings.sys_path
        settle(surroundings, self.log)
        self._connection.types = wire_types(surroundings.kinds)
        blueprint: StageBlueprint = self._next()
        return blueprint

    def _serve(self, servant: StageServant) -> None:
        while True:
            orders = self._orders(wait=not servant.has_work())
            news = servant.news()
            if news is not None:
                self._send(news)
            report = servant.turn(orders)
            orders.clear()  # the tensors of other processes that they brought are copied, and can be returned
            try:
                self._send(report, None if self._tensors is None else self._tensors.exporter(report))
            except WireError as error:
                self._send(servant.unsent(report, error))
            if report.breakdown is not None:
                return

    def _orders(self, wait: bool) -> list[StageOrder]:
        """Those that are here; with `wait`, until there are some or the engine's own work wakes it."""
        self._read(wait)
        orders: list[StageOrder] = []
        while (order := self._connection.take()) is not None:
            orders.append(order)
        return orders

    def _next(self) -> Any:
        while (message := self._connection.take()) is None:
            self._read(wait=True)
        return message

    def _read(self, wait: bool) -> None:
        self._connection.read()
        if wait and not self._connection.has_frame and not self._connection.is_closed:
            with self._sending:
                self._connection.flush()
            news = select.POLLIN | (select.POLLOUT if self._connection.has_unsent else 0)
            if self._waking in _ready({self._connection.file: news, self._waking: select.POLLIN}):
                os.read(self._waking, 4096)
            self._connection.read()
        if self._connection.is_closed:
            raise _PartedError

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
                _ready({self._connection.file: select.POLLOUT})
                self._connection.flush()

    def _finish(self) -> None:
        """The parent closes when it has read the last word."""
        with self._sending:
            self._connection.close()

    def _wake(self) -> None:
        try:
            os.write(self._wakes, b"!")
        except BlockingIOError:
            return

    def log(self, line: LogLine) -> None:
        """From any thread; nothing where the parent is gone."""
        if not self._connection.is_closed:
            self._send(line)


def device_tensors(blueprint: StageBlueprint) -> DeviceTensors | None:
    """None for a stage whose tensors all pass through the host's memory, as where there is no driver of CUDA."""
    memory = CudaMemory.find(blueprint.device) if is_cuda(blueprint.device) else None
    return None if memory is None else DeviceTensors(blueprint.stays_on_device, memory)


def _ready(events: Mapping[int, int]) -> set[int]:
    """Waits for one of these events of descriptors, and gives those that have some. Not by `select.select`, which knows
    none from 1024 on: ours have the number that they have in a parent with many connections.
    """
    poll = select.poll()
    for file, asked in events.items():
        poll.register(file, asked)
    return {file for file, _ in poll.poll()}


class _PartedError(Exception):
    """The parent has closed the connection, or is gone."""
