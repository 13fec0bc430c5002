"""Two stages that compute nothing, to measure the edge between them: `hop_source` gives a tensor of as many bytes as
the prompt says, `hop_sink` takes it. Each notes the time, which processes of one machine share.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_omni import registry
from vllm_omni.engine.base import Activity, EngineContext, StageEngine, StageSpec
from vllm_omni.messages import StageDone, StageEvent, StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec
from vllm_omni.utils.device import is_cuda, wait_for

BYTES = TensorSpec(("n",))


@dataclass(frozen=True, slots=True)
class HopOptions:
    """None."""


class HopSpec(StageSpec):
    """What both share."""

    options_type = HopOptions
    params_type = StageParams
    engine_type: type[Any]

    def load(self, context: EngineContext) -> StageEngine:
        return self.engine_type(context.device)


class HopEngine(StageEngine):
    """Answers every task in one step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tasks: dict[str, tuple[StageTask, float]] = {}
        self._made: dict[int, Tensor] = {}

    def submit(self, task: StageTask) -> None:
        """Its tensors are on this stage's device when the time is noted."""
        inputs = {name: value.to(self._device) for name, value in task.inputs.items()}
        if is_cuda(self._device):
            wait_for(self._device)
        self._tasks[task.request_id] = (dataclasses.replace(task, inputs=inputs), time.monotonic())

    def step(self) -> list[StageEvent]:
        events = [self._done(task, taken_s) for task, taken_s in self._tasks.values()]
        self._tasks.clear()
        return events

    def abort(self, request_id: str) -> None:
        self._tasks.pop(request_id, None)

    def activity(self) -> Activity:
        return Activity.BUSY if self._tasks else Activity.IDLE

    def _done(self, task: StageTask, taken_s: float) -> StageEvent:
        raise NotImplementedError


class Source(HopEngine):
    def _done(self, task: StageTask, taken_s: float) -> StageEvent:
        size = int(str(task.request.prompt))
        if size not in self._made:
            self._made[size] = hop_bytes(size).to(self._device)
        made = self._made[size]
        return StageDone(StagePayload(task.request_id, "source", {"bytes": made}), {"given_s": time.monotonic()})


class Sink(HopEngine):
    def _done(self, task: StageTask, taken_s: float) -> StageEvent:
        given = task.inputs["bytes"]
        seen = torch.tensor([len(given), int(given.sum(dtype=torch.int64))])
        return StageDone(StagePayload(task.request_id, "sink", {"bytes": seen}), {"taken_s": taken_s})


class SourceSpec(HopSpec):
    engine_type = Source
    signature = StageSignature(outputs={"bytes": BYTES})


class SinkSpec(HopSpec):
    engine_type = Sink
    signature = StageSignature({"bytes": BYTES}, {"bytes": BYTES}, frozenset({"bytes"}))


def hop_bytes(size: int) -> Tensor:
    """[size] uint8, of which no part is like the next."""
    return (torch.arange(size, dtype=torch.int32) % 251).to(torch.uint8)


def hop_config(executor: str, device: str = "cpu", *, through_host: bool = False) -> dict[str, Any]:
    """source -> sink, each in an executor of that name; the sink gives how many bytes it got, and their sum.
    through_host: whether the tensor is read here as well, so that it cannot stay on its device.
    """
    for name, spec in (("hop_source", "SourceSpec"), ("hop_sink", "SinkSpec")):
        registry.register("stage kind", name, f"benchmarks.hop_stages:{spec}")
    return {
        "name": "hops",
        "executor": executor,
        "device": device,
        "stages": {
            "source": {"kind": "hop_source"},
            "sink": {"kind": "hop_sink", "inputs": {"bytes": "source.bytes"}},
        },
        "outputs": ["sink.bytes", *(["source.bytes"] if through_host else [])],
    }
