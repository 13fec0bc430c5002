"""What a request asks of each stage, worked out and checked before it is admitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vllm_omni.config.graph import StageGraph
from vllm_omni.core.routing.request_plan import RequestPlan, StagePlan, kept_ports
from vllm_omni.engine.base import StageTask
from vllm_omni.engine.boundary import stage_boundary
from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.executor.stage_host import StageHost
from vllm_omni.params import StageParams
from vllm_omni.request import PROMPT_KEYS, OmniRequest
from vllm_omni.utils.checks import check_number, did_you_mean


class RequestPlanner:
    """Makes the RequestPlan of a request, or raises the OmniError for which it must be rejected."""

    def __init__(self, graph: StageGraph, hosts: Mapping[str, StageHost]) -> None:
        self._graph = graph
        self._hosts = hosts
        self._kept = kept_ports(graph)
        self._keys = {name: host.engine_class.request_keys(host.stage) for name, host in hosts.items()}

    def plan(self, request: OmniRequest) -> RequestPlan:
        """Resolves parameters, asks every stage that the request needs, and sums the job's size."""
        self._check_params(request)
        params = {name: self._resolve(request, host) for name, host in self._hosts.items()}
        demand = self._graph.demand(lambda stage: self._needed_inputs(stage, request, params[stage]))
        self._check_fields(request, demand)
        self._check_params_are_read(request, demand)
        stages: dict[str, StagePlan] = {}
        job_size = 0.0
        for name, ports in demand.items():
            host = self._hosts[name]
            host.check(request, params[name])
            job_size += _checked_size(name, host.job_size(request, params[name]))
            stages[name] = StagePlan(
                params[name],
                tuple(edge for edge in self._graph.edges_into(name) if edge.target_port in ports),
                self._cache_key(request, name, params[name]),
                self._graph.signatures[name].required_inputs,
            )
        return RequestPlan(stages, self._kept, job_size)

    def _check_params(self, request: OmniRequest) -> None:
        if request.params is None:
            return
        if isinstance(request.params, Mapping):
            for name, given in request.params.items():
                if name in self._graph.idle:
                    raise InvalidRequestError(
                        f"params[{name!r}]: the stage is not loaded, since no output calls for it"
                    )
                if name not in self._hosts:
                    raise InvalidRequestError(f"params[{name!r}]: unknown stage{did_you_mean(str(name), self._hosts)}")
                if given is None:
                    raise InvalidRequestError(f"params[{name!r}]: got None; leave the stage out to use its defaults")
            return
        types = {host.engine_class.params_type for host in self._hosts.values()}
        if not isinstance(request.params, tuple(types)):
            got, expected = type(request.params).__name__, ", ".join(sorted(kind.__name__ for kind in types))
            raise InvalidRequestError(
                f"params: got {got}, which no stage takes; expected {expected} or a dict of stage -> params"
            )

    def _check_fields(self, request: OmniRequest, running: Collection[str]) -> None:
        """Refuses what no stage of this request would read: a typo, or an input of a stage that rests."""
        for key, value in request.fields.items():
            readers = [name for name, keys in self._keys.items() if key in keys]
            if not readers:
                known = PROMPT_KEYS.union(*self._keys.values())
                raise InvalidRequestError(f"prompt[{key!r:.80}]: unknown key{did_you_mean(key[:80], known)}")
            if value is not None and not any(name in running for name in readers):
                raise InvalidRequestError(
                    f"prompt[{key!r}]: stage {readers[0]!r} reads it, which does not run for this request; leave it out"
                )

    def _check_params_are_read(self, request: OmniRequest, demand: Collection[str]) -> None:
        """Refuses parameters that set something and that no stage would look at."""
        given = request.params
        if isinstance(given, Mapping):
            for name, params in given.items():
                if _words(params) and not (name in demand and self._reads_params(name)):
                    why = "samples nothing" if name in demand else "does not run for this request"
                    raise InvalidRequestError(
                        f"params[{name!r}]: got {_words(params)}, but the stage {why}; leave it out"
                    )
        elif given is not None and _words(given):
            types = {self._hosts[name].engine_class.params_type for name in demand if self._reads_params(name)}
            if not isinstance(given, tuple(types)):
                expected = " or ".join(sorted(kind.__name__ for kind in types)) or "none"
                raise InvalidRequestError(
                    f"params: got {_words(given)}, which no stage of this request reads; expected {expected}"
                )

    def _reads_params(self, name: str) -> bool:
        host = self._hosts[name]
        return host.engine_class.reads_params(host.stage)

    def _resolve(self, request: OmniRequest, host: StageHost) -> StageParams:
        with stage_boundary(host.name):
            return request.params_for(host.name, host.engine_class.params_type).with_defaults(host.stage.defaults)

    def _needed_inputs(self, name: str, request: OmniRequest, params: StageParams) -> frozenset[str]:
        host = self._hosts[name]
        with stage_boundary(name):
            return host.engine_class.needed_inputs(host.stage, request, params)

    def _cache_key(
        self, request: OmniRequest, name: str, params: StageParams
    ) -> Callable[[Mapping[str, Any]], str | None]:
        host = self._hosts[name]

        def cache_key(inputs: Mapping[str, Any]) -> str | None:
            with stage_boundary(name):
                return host.engine_class.cache_key(host.stage, StageTask(request, name, params, inputs))

        return cache_key


def _words(params: StageParams) -> str:
    """'SamplingParams with seed, n' for those that are set; '' where none is."""
    names = [field.name for field in dataclasses.fields(params) if getattr(params, field.name) is not None]
    return f"{type(params).__name__} with {', '.join(names)}" if names else ""


def _checked_size(stage: str, size: float) -> float:
    check_number(f"stage {stage!r}: job_size", size, 0, raises=StageError)
    return size
