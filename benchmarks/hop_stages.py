"""Two stages that compute nothing, to measure the edge between them: `hop_source` gives a tensor of as many bytes as
the prompt says, `hop_sink` takes it. Each notes the time, which processes of one machine share.
"""

from __future__ import annotations

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
        return self.engine_type()


class HopEngine(StageEngine):
    """Answers every task in one step."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[StageTask, float]] = {}
        self._made: dict[int, Tensor] = {}

    def submit(self, task: StageTask) -> None:
        self._tasks[task.request_id] = (task, time.monotonic())

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
        made = self._made.setdefault(size, torch.ones(size, dtype=torch.uint8))
        return StageDone(StagePayload(task.request_id, "source", {"bytes": made}), {"given_s": time.monotonic()})


class Sink(HopEngine):
    def _done(self, task: StageTask, taken_s: float) -> StageEvent:
        count = torch.tensor([len(task.inputs["bytes"])])
        return StageDone(StagePayload(task.request_id, "sink", {"bytes": count}), {"taken_s": taken_s})


class SourceSpec(HopSpec):
    engine_type = Source
    signature = StageSignature(outputs={"bytes": BYTES})


class SinkSpec(HopSpec):
    engine_type = Sink
    signature = StageSignature({"bytes": BYTES}, {"bytes": BYTES}, frozenset({"bytes"}))


def hop_config(executor: str) -> dict[str, Any]:
    """source -> sink, each in an executor of that name."""
    for name, spec in (("hop_source", "SourceSpec"), ("hop_sink", "SinkSpec")):
        registry.register("stage kind", name, f"benchmarks.hop_stages:{spec}")
    return {
        "name": "hops",
        "executor": executor,
        "device": "cpu",
        "stages": {
            "source": {"kind": "hop_source"},
            "sink": {"kind": "hop_sink", "inputs": {"bytes": "source.bytes"}},
        },
        "outputs": ["sink.bytes"],
    }
