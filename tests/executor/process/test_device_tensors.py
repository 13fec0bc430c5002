"""Tensors that stay on their device from process to process: nothing goes through the host, the giver keeps them as
long as somebody may read them, lies and losses harm one request.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.connections import Pair
from torch import Tensor

from benchmarks.hop_stages import hop_config
from vllm_omni.config.loader import load_config
from vllm_omni.engine.base import Activity
from vllm_omni.errors import StageError
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.orders import Report, Submit
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.process.connection import FAR_ENTRY
from vllm_omni.executor.process.device_tensors import LEAST_BYTES, DeviceTensors
from vllm_omni.executor.process.session import device_tensors
from vllm_omni.executor.servant import StageServant
from vllm_omni.executor.stage_builder import StageBuilder
from vllm_omni.executor.wire.base import WireError
from vllm_omni.executor.wire.tensors import far_tensor
from vllm_omni.messages import StageDone, StageFailed, StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload
from vllm_omni.request import OmniRequest
from vllm_omni.utils import device_memory
from vllm_omni.utils.device_memory import HANDLE_BYTES, DeviceHandle, FarTensor
from vllm_omni.worker.background import Background

SIZE = 2 * LEAST_BYTES


class Memory:
    """Of a device that processes share; what lies there is known by its handle."""

    def __init__(self) -> None:
        self.tensors: dict[bytes, Tensor] = {}
        self._numbers = itertools.count()
        self.has_handles = True

    def export(self, tensor: Tensor) -> DeviceHandle | None:
        if not self.has_handles:
            return None
        handle = next(self._numbers).to_bytes(HANDLE_BYTES, "big")
        self.tensors[handle] = tensor
        return DeviceHandle("gpu", handle, tensor.nbytes + 512, 512)

    def copy(self, tensor: FarTensor) -> Tensor:
        if tensor.handle.handle not in self.tensors:
            raise StageError("got error 201 of the driver")
        return self.tensors[tensor.handle.handle].clone()


@dataclasses.dataclass
class Way:
    """From the process of a source to this one, and on to the process of a sink."""

    memory: Memory
    source: Pair
    sink: Pair

    def give(self, value: Tensor, port: str = "states") -> Tensor:
        """What arrives here of a payload."""
        report = Report(0, Activity.IDLE.value, [StageDone(StagePayload("r", "source", {port: value}))])
        tensors = DeviceTensors(frozenset({"states"}), self.memory)
        arrived: Report = self.source.send(report, export=tensors.exporter(report))
        (done,) = arrived.events
        assert isinstance(done, StageDone)
        return done.payload.tensors[port]

    def take(self, value: Tensor) -> StageTask:
        """The task that the sink gets with it."""
        order: Submit = self.sink.send(Submit(task_with(value)))
        return order.task

    def settle(self) -> None:
        for _ in range(2):
            self.sink.settle()
            self.source.settle()


@pytest.fixture
def way() -> Iterator[Way]:
    way = Way(Memory(), Pair(), Pair())
    yield way
    way.source.close()
    way.sink.close()


def task_with(value: Any) -> StageTask:
    return StageTask(OmniRequest(prompt="x", request_id="r"), "sink", StageParams(), {"states": value})


def states() -> Tensor:
    return torch.arange(SIZE // 4, dtype=torch.int32).view(-1, 8)


def test_a_tensor_that_stays_reaches_its_reader_without_the_host(way: Way) -> None:
    value = states()
    here = way.give(value)
    assert isinstance(here, FarTensor) and here.shape == value.shape and here.dtype == value.dtype
    task = way.take(here)
    fetched = DeviceTensors(frozenset(), way.memory).fetch(task).inputs["states"]
    assert torch.equal(fetched, value) and fetched.data_ptr() != value.data_ptr()
    assert not any(memory.num_bytes for pair in (way.source, way.sink) for memory in (pair.here, pair.there))


def test_the_giver_keeps_it_until_nobody_can_read_it_any_more(way: Way) -> None:
    value = states()
    here = way.give(value)
    task = way.take(here)
    way.settle()
    assert way.source.near.num_lent == way.sink.near.num_lent == 1
    del task
    way.settle()
    assert (way.sink.near.num_lent, way.source.near.num_lent) == (0, 1)  # it may be given to another, too
    again = way.take(here)
    del here
    way.settle()
    assert way.source.near.num_lent == 1
    del again
    way.settle()
    assert way.source.near.num_lent == 0


@pytest.mark.parametrize("why", ["another port", "small", "no handle"])
def test_what_cannot_stay_goes_through_the_host(way: Way, why: str) -> None:
    value = states()[:4] if why == "small" else states()
    way.memory.has_handles = why != "no handle"
    arrived = way.give(value, "other" if why == "another port" else "states")
    assert type(arrived) is Tensor and torch.equal(arrived, value)


def test_a_tensor_that_is_lost_fails_its_request_alone(way: Way) -> None:
    """The sink tells of it, as of any task that cannot begin; here the end of the giver is known before that."""
    here = way.give(states())
    task = way.take(here)
    way.memory.tensors.clear()
    tensors = DeviceTensors(frozenset(), way.memory)
    report = StageServant("sink", Deaf(), tensors.fetch).turn([Submit(task)])  # type: ignore[arg-type]
    (failed,) = report.events
    assert isinstance(failed, StageFailed) and failed.request_id == "r" and report.breakdown is None
    payload = StagePayload("r", "source", {"states": here})
    assert not payload.is_lost
    way.source.near.close()
    way.source.far.read()
    assert payload.is_lost  # so nobody is given it from a cache
    with pytest.raises(WireError, match="lost with the process that held it"):
        way.take(here)
    assert way.sink.send("next") == "next"


class Deaf:
    """An engine that is asked for nothing."""

    def abort(self, request_id: str) -> None: ...
    def activity(self) -> Activity:
        return Activity.IDLE

    def breakdown(self) -> None: ...


HANDLE = bytes(HANDLE_BYTES)


@pytest.mark.parametrize(
    "entry",
    [
        ["int32", [8], "gpu", HANDLE, 32, 4],  # ends behind the allocation
        ["int32", [8], "gpu", HANDLE, 64, -4],
        ["int32", [8], "gpu", HANDLE[:-1], 64, 0],
        ["int32", [8], "gpu", "x" * HANDLE_BYTES, 64, 0],
        ["int32", [8], 7, HANDLE, 64, 0],
        ["int32", [8], "gpu" * 40, HANDLE, 64, 0],
        ["int32", [8], "gpu", HANDLE, 64, 0.5],
        ["int32", [-8], "gpu", HANDLE, 64, 0],
        ["int32", [2**62, 2**62], "gpu", HANDLE, 64, 0],
        ["qint8", [8], "gpu", HANDLE, 64, 0],
        ["int32", 8, "gpu", HANDLE, 64, 0],
    ],
)
def test_a_handle_that_lies_is_refused(entry: list[Any]) -> None:
    assert len(entry) == FAR_ENTRY - 1
    with pytest.raises(WireError):
        far_tensor(entry, lambda: False)


def test_a_far_tensor_has_no_content_to_be_mistaken_for(way: Way) -> None:
    here = way.give(states())
    assert here.nbytes == SIZE and here.numel() == SIZE // 4
    with pytest.raises(NotImplementedError, match="meta"):
        here.cpu()


def test_only_what_processes_on_the_same_gpu_read_whole_stays_there() -> None:
    first, second = torch.device("cuda"), torch.device("cuda:1")

    def staying(*devices: torch.device, through_host: bool = False, executor: str = "process") -> frozenset[str]:
        config = load_config(hop_config("process", through_host=through_host), [f"sink.executor={executor}"])
        builder = StageBuilder(Pipeline(config), Background(), Commons())
        builder.devices = {"source": devices[:1], "sink": devices[1:]}
        return builder.blueprint("source").stays_on_device

    assert staying(first, torch.device("cuda:0")) == {"bytes"}
    assert not staying(first, second)
    assert not staying(first, first, second)  # a replica is elsewhere
    assert not staying(torch.device("cpu"), torch.device("cpu"))
    assert not staying(first, first, through_host=True)
    assert not staying(first, first, executor="inline")


def test_where_there_is_no_driver_of_cuda_all_tensors_go_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls a GPU of AMD `cuda`, too."""
    monkeypatch.setattr(device_memory, "LIBRARY", "libnothing.so.7")
    monkeypatch.setattr(device_memory, "device_name", lambda device: "gpu")
    config = load_config(hop_config("process", through_host=False))
    blueprint = StageBuilder(Pipeline(config), Background(), Commons()).blueprint("source")
    assert device_tensors(blueprint) is None
    assert device_tensors(dataclasses.replace(blueprint, device=torch.device("cuda"))) is None
