"""Which tensors of a stage's process stay on its device when they are sent, and how those come in that did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping
from weakref import WeakValueDictionary

from torch import Tensor

from vllm_omni.executor.orders import Report
from vllm_omni.messages import StageDone, StageTask
from vllm_omni.utils.device_memory import DeviceHandle, DeviceMemory, FarTensor

LEAST_BYTES = 2**18  # below, to open a handle takes longer than two copies through the host's memory


class DeviceTensors:
    """ports: those of the stage whose tensors stay. memory: of its device. exported: what stages of this process have
    given away, which another of it reads where it lies: a driver opens no handle of its own process.
    """

    def __init__(
        self,
        ports: frozenset[str],
        memory: DeviceMemory,
        exported: MutableMapping[DeviceHandle, Tensor] | None = None,
    ) -> None:
        self._ports = ports
        self._memory = memory
        self._exported = WeakValueDictionary() if exported is None else exported

    def exporter(self, report: Report) -> Callable[[Tensor], DeviceHandle | None]:
        """As a Parcel's `export`, for what a report brings."""
        done = [event.payload for event in report.events if isinstance(event, StageDone)] if self._ports else []
        staying = [tensor for each in done for port, tensor in each.tensors.items() if port in self._ports]
        known = {(tensor.data_ptr(), tensor.nbytes) for tensor in staying if tensor.nbytes >= LEAST_BYTES}

        def export(tensor: Tensor) -> DeviceHandle | None:
            stays = bool(known) and (tensor.data_ptr(), tensor.nbytes) in known
            handle = self._memory.export(tensor) if stays else None
            if handle is not None:
                self._exported[handle] = tensor
            return handle

        return export

    def fetch(self, task: StageTask) -> StageTask:
        """With inputs that are here; StageError where one cannot be had."""
        found = {port: self._near(value) for port, value in task.inputs.items() if isinstance(value, FarTensor)}
        return dataclasses.replace(task, inputs={**task.inputs, **found}) if found else task

    def _near(self, tensor: FarTensor) -> Tensor:
        here = self._exported.get(tensor.handle)
        return self._memory.copy(tensor) if here is None else here
