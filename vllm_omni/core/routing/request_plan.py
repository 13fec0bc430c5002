"""How one request uses the stages, worked out before it is admitted. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.params import StageParams


def _never_cached(inputs: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How one request uses one stage.

    edges: those into the stage that are read, one a port. cache_key: complete inputs -> a key under which the payload
    may serve other requests, or None; may raise an OmniError. required_inputs: the ports without which the stage does
    not run.
    """

    params: StageParams
    edges: Sequence[Edge] = ()
    cache_key: Callable[[Mapping[str, Any]], str | None] = _never_cached
    required_inputs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """The stages of one request in topological order.

    kept: the stages whose payload the caller gets -> the tensors of it to keep. job_size: for shortest job first.
    """

    stages: Mapping[str, StagePlan] = field(default_factory=dict)
    kept: Mapping[str, frozenset[str]] = field(default_factory=dict)
    job_size: float = 1.0


def default_plan(graph: StageGraph | None) -> RequestPlan:
    """Every stage that the graph's outputs call for, all its edges read, parameters unset."""
    if graph is None:
        return RequestPlan()
    demand = graph.demand(lambda stage: frozenset(graph.signatures[stage].inputs))
    stages = {
        stage: StagePlan(
            StageParams(), graph.edges_into(stage), required_inputs=graph.signatures[stage].required_inputs
        )
        for stage in demand
    }
    return RequestPlan(stages, kept_ports(graph))


def kept_ports(graph: StageGraph) -> dict[str, frozenset[str]]:
    """Stages that `outputs` lists -> the ports to keep of their payloads: the port it names, or the stage's results."""
    kept: dict[str, frozenset[str]] = {}
    for entry in graph.outputs:
        stage, _, port = entry.partition(".")
        ports = frozenset({port}) if port else graph.signatures[stage].results
        kept[stage] = kept.get(stage, frozenset()) | ports
    return kept
