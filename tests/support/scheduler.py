"""A diamond of stages that exist in name only, and the moves of a scheduler over them."""

from __future__ import annotations

import torch

from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.config.schema import (
    OmniConfig,
    SchedulerConfig,
    StageConfig,
)
from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.core.routing.request_plan import RequestPlan, StagePlan
from vllm_omni.messages import StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec
from vllm_omni.request import OmniRequest

SPEC = TensorSpec(("T",))
SIGNATURE = StageSignature({"x": SPEC, "y": SPEC}, {"out": SPEC, "extra": SPEC}, results=frozenset({"out"}))


def diamond(outputs: tuple[str, ...] = ("d", "a.extra")) -> StageGraph:
    """a feeds b and c, which both feed d."""
    edges = {"a": {}, "b": {"x": "a.out"}, "c": {"x": "a.out"}, "d": {"x": "b.out", "y": "c.out"}}
    stages = {name: StageConfig(name=name, kind="toy", inputs=inputs) for name, inputs in edges.items()}
    return StageGraph(stages, dict.fromkeys(stages, SIGNATURE), outputs)


def scheduler(graph: StageGraph | None = None, **changes: object) -> OmniScheduler:
    options = {key: changes.pop(key) for key in list(changes) if key in SchedulerConfig.__dataclass_fields__}
    return OmniScheduler(OmniConfig(scheduler=SchedulerConfig(**options), **changes), graph or diamond())


def request(name: str = "r", **changes: object) -> OmniRequest:
    return OmniRequest(prompt="hi", request_id=name, **changes)


def reader(**sources: str) -> StagePlan:
    """The plan of a stage that reads `out` of one other: reader(b="a")."""
    ((target, source),) = sources.items()
    return StagePlan(StageParams(), (Edge(source, "out", target, "x"),))


def payload(launch: StageTask) -> StagePayload:
    tensors = {"out": torch.zeros(2), "extra": torch.ones(3)}
    return StagePayload(launch.request.request_id, launch.stage, tensors)


def finish(machine: OmniScheduler, launch: StageTask, now: float = 0.0) -> None:
    machine.stage_done(launch.request.request_id, launch.stage, payload(launch), {"steps": 1}, now)


def run_to_end(machine: OmniScheduler, now: float = 0.0) -> None:
    while launches := machine.tick(now):
        for launch in launches:
            finish(machine, launch, now)
        machine.check_integrity()


def stages_of(launches: list[StageTask]) -> list[str]:
    return sorted(launch.stage for launch in launches)


def cached_plan(key: str) -> RequestPlan:
    return RequestPlan(
        {"a": StagePlan(StageParams(), cache_key=lambda task: key), "b": reader(b="a")},
        {"b": frozenset({"out"})},
    )
