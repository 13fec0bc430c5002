"""How one request uses the stages, worked out before it is admitted. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.messages import StageTask
from vllm_omni.params import StageParams
from vllm_omni.request import OmniRequest

if TYPE_CHECKING:
    from torch import Tensor

ReadText = Callable[[str, bool], "Tensor"]  # a piece of a text, and whether it is the last -> rows of a port [n, ...]


def _never_cached(task: StageTask) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How one request uses one stage."""

    params: StageParams
    edges: Sequence[Edge] = ()  # those into the stage that are read, one a port
    required_inputs: frozenset[str] = frozenset()  # the ports without which the stage does not run
    prepared: Any = None  # what the stage made of the request when it checked it
    seed: int | None = None  # what it draws from, given or drawn; None where it draws nothing
    asked: OmniRequest | None = None  # the request as the stage was asked about it; None: as it came
    saved: Mapping[str, Any] | None = None  # where it goes on from, of a request that was saved
    job_size: float = 1.0  # of this stage alone
    prefixes: tuple[int, ...] = ()  # as of StageTask
    read_text: ReadText | None = None  # of a request that is open: makes the rows of the edges from its caller
    # a task with its inputs -> a key under which its payload may serve other requests, or None; may raise an OmniError
    cache_key: Callable[[StageTask], str | None] = _never_cached

    @property
    def seeded_params(self) -> StageParams:
        """The parameters with the seed."""
        if self.seed is None:
            return self.params
        return replace(self.params, seed=self.seed)  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """The stages of one request."""

    stages: Mapping[str, StagePlan] = field(default_factory=dict)  # in topological order
    kept: Mapping[str, frozenset[str]] = field(default_factory=dict)  # stage -> ports that the caller gets
    outputs: Sequence[str] = ()  # which entries of the config's `outputs` the caller gets
    job_size: float = 1.0  # for shortest job first


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
    return RequestPlan(stages, kept_ports(graph, graph.outputs), graph.outputs)


def kept_ports(graph: StageGraph, outputs: Sequence[str]) -> dict[str, frozenset[str]]:
    """Stages that `outputs` lists -> the ports to keep of their payloads: the port it names, or the stage's results."""
    kept: dict[str, frozenset[str]] = {}
    for entry in outputs:
        stage, _, port = entry.partition(".")
        ports = frozenset({port}) if port else graph.signatures[stage].results
        kept[stage] = kept.get(stage, frozenset()) | ports
    return kept
