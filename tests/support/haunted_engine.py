"""A toy text stage, "haunted": its methods raise at the calls that a plan names, whichever engine it is by then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

import torch
from support.toy_engine import TextEngine, TextSpecimen, toy_config, toy_stage

from vllm_omni import registry
from vllm_omni.config.schema import OmniConfig
from vllm_omni.engine.base import Activity, EngineContext, StageEngine
from vllm_omni.messages import StageEvent, StageTask
from vllm_omni.payload import StagePayload

PLACES = ("submit", "step", "abort", "partial_result", "activity", "check_integrity", "load")
ERRORS = (
    RuntimeError("boom"),
    MemoryError("no memory"),
    torch.OutOfMemoryError("CUDA out of memory"),
    KeyError("which?"),
)


class Haunting:
    """plan: place -> the calls, counted from 0, that raise. Counts over all engines since `begin`."""

    def __init__(self) -> None:
        self.begin({})

    def begin(self, plan: Mapping[str, Set[int]]) -> None:
        self.plan = plan
        self.calls: Counter[str] = Counter()
        self.num_raised = 0

    def visit(self, place: str) -> None:
        number = self.calls[place]
        self.calls[place] += 1
        if number in self.plan.get(place, ()):
            self.num_raised += 1
            raise ERRORS[(number + len(place)) % len(ERRORS)]


HAUNTING = Haunting()


class HauntedEngine(TextEngine):
    def submit(self, task: StageTask) -> None:
        HAUNTING.visit("submit")
        super().submit(task)

    def step(self) -> list[StageEvent]:
        HAUNTING.visit("step")
        return super().step()

    def abort(self, request_id: str) -> None:
        HAUNTING.visit("abort")
        super().abort(request_id)

    def partial_result(self, request_id: str) -> StagePayload | None:
        HAUNTING.visit("partial_result")
        return super().partial_result(request_id)

    def activity(self) -> Activity:
        HAUNTING.visit("activity")
        return super().activity()

    def check_integrity(self) -> None:
        HAUNTING.visit("check_integrity")


class HauntedSpec(TextSpecimen):
    engine_type = HauntedEngine

    def load(self, context: EngineContext) -> StageEngine:
        HAUNTING.visit("load")
        return super().load(context)


def haunted_config(executor: str = "inline", **changes: Any) -> OmniConfig:
    """A haunted `text_a` beside a good `text_b`; requests use both."""
    registry.register("stage kind", "haunted", f"{__name__}:HauntedSpec")
    stages = {
        "text_a": toy_stage("text_a", "haunted", executor=executor),
        "text_b": toy_stage("text_b", "toy_text"),
    }
    return toy_config(stages=stages, outputs=("text_a", "text_b"), **changes)
