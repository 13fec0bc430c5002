"""What a request asks of each stage, worked out and checked before it is admitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from vllm_omni.config.graph import CALLER, Edge
from vllm_omni.config.schema import StreamConfig
from vllm_omni.core.routing.request_plan import RequestPlan, StagePlan, kept_ports
from vllm_omni.engine.base import ReadPorts, StageSpec
from vllm_omni.engine.boundary import clear_frames, describe, stage_boundary
from vllm_omni.engine.lora import loras_of
from vllm_omni.errors import InvalidRequestError, OmniError, SchedulerError, StageError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.saving import check_saved
from vllm_omni.messages import StageTask
from vllm_omni.params import DiffusionParams, SamplingParams, StageParams, draw_seed
from vllm_omni.request import PROMPT_KEYS, OmniRequest
from vllm_omni.utils.checks import check_number, did_you_mean


class RequestPlanner:
    """Makes the RequestPlan of a request, or raises the OmniError for which it must be rejected. Knows the specs of the
    stages alone, so that any thread may ask.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._graph = pipeline.graph
        self._specs = pipeline.specs
        self._reads = pipeline.reads

    def plan_or_error(self, request: OmniRequest) -> RequestPlan | OmniError:
        """As `plan`, but what that raises is given back; whatever is no OmniError becomes one."""
        try:
            return self.plan(request)
        except OmniError as error:
            return error
        except Exception as error:  # whatever foreign code in the request's values raises
            failed = SchedulerError(f"request {request.request_id!r} could not be planned: {describe(error)}")
            clear_frames(error)
            failed.__cause__ = error
            return failed

    def plan(self, request: OmniRequest) -> RequestPlan:
        """Resolves parameters, asks every stage that the request needs, and sums the job's size."""
        check_saved(request, self._pipeline)
        self._check_params(request)
        outputs = self._outputs_of(request)
        params = {name: _resolve(request, spec) for name, spec in self._specs.items()}
        demand = self._graph.demand(lambda stage: self._needed_inputs(stage, request, params[stage]), outputs)
        self._check_open(request, demand)
        if not request.saved:  # else some of what it was given has been read
            self._check_fields(request, demand)
            self._check_params_are_read(request, demand)
        words = _with_negative_defaults(request, {name: params[name] for name in demand})
        stages: dict[str, StagePlan] = {}
        job_size, request_seed = 0.0, _request_seed(request)
        for name, ports in demand.items():
            spec = self._specs[name]
            with stage_boundary(name):
                seed = _seed(spec, params[name], request_seed)
                _check_loras(spec, params[name])
                asked = request if isinstance(params[name], DiffusionParams) else words
                prepared = spec.check(asked, params[name], self._reads_in(name, demand))
                size = _checked_size(name, spec.job_size(request, params[name], prepared))
                prefixes = spec.prefixes(params[name], prepared) if spec.stage.replicas > 1 else ()
                text_edges = self._text_edges(name) if request.is_open else ()
                read_text = spec.open_text(request, prepared) if text_edges else None
            job_size += size
            saved = request.saved.get(name)
            stages[name] = StagePlan(
                params[name],
                (*(edge for edge in self._graph.edges_into(name) if edge.target_port in ports), *text_edges),
                frozenset() if saved else self._graph.signatures[name].required_inputs,
                prepared,
                seed,
                asked,
                saved.content if saved else None,
                size,
                prefixes,
                read_text,
                _guarded_cache_key(spec),
            )
        return RequestPlan(stages, kept_ports(self._graph, outputs), outputs, job_size)

    def _reads_in(self, name: str, demand: Mapping[str, Collection[str]]) -> ReadPorts:
        """Who reads a stage, with only those stages that run for the request."""
        edges = self._graph.edges_from(name)
        is_read = any(edge.target_port in demand.get(edge.target, ()) for edge in edges)
        return dataclasses.replace(self._reads[name], by_stages=is_read)

    def _check_open(self, request: OmniRequest, demand: Mapping[str, Collection[str]]) -> None:
        """InvalidRequestError where a stage would read the text of an open request before it is complete."""
        for name, ports in demand.items() if request.is_open else ():
            if not ports and not self._graph.signatures[name].text_inputs:
                raise InvalidRequestError(
                    f"prompt: got a text in pieces, but stage {name!r} reads it whole; give one string"
                )

    def _text_edges(self, name: str) -> tuple[Edge, ...]:
        """Over which the text of an open request comes to a stage."""
        ports = self._graph.signatures[name].text_inputs
        return tuple(Edge(CALLER, port, name, port, stream=StreamConfig(), takes_chunks=True) for port in ports)

    def _outputs_of(self, request: OmniRequest) -> Sequence[str]:
        if request.outputs is None:
            return self._graph.outputs
        for entry in request.outputs:
            if entry not in self._graph.outputs:
                raise InvalidRequestError(f"outputs: got {entry!r:.80}{did_you_mean(entry[:80], self._graph.outputs)}")
        return request.outputs

    def _check_params(self, request: OmniRequest) -> None:
        if request.params is None:
            return
        if isinstance(request.params, Mapping):
            for name, given in request.params.items():
                if name in self._graph.idle:
                    raise InvalidRequestError(
                        f"params[{name!r}]: the stage is not loaded, since no output calls for it"
                    )
                if name not in self._specs:
                    raise InvalidRequestError(f"params[{name!r}]: unknown stage{did_you_mean(str(name), self._specs)}")
                if given is None:
                    raise InvalidRequestError(f"params[{name!r}]: got None; leave the stage out to use its defaults")
            return
        types = {spec.params_type for spec in self._specs.values()}
        if not isinstance(request.params, tuple(types)):
            got, expected = type(request.params).__name__, ", ".join(sorted(kind.__name__ for kind in types))
            raise InvalidRequestError(
                f"params: got {got}, which no stage takes; expected {expected} or a dict of stage -> params"
            )

    def _check_fields(self, request: OmniRequest, running: Collection[str]) -> None:
        """Refuses what no stage of this request would read: a typo, or an input of a stage that rests."""
        for key, value in request.fields.items():
            readers = [name for name, spec in self._specs.items() if key in spec.request_keys]
            if not readers:
                known = PROMPT_KEYS.union(*(spec.request_keys for spec in self._specs.values()))
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
                if _words(params) and not (name in demand and self._specs[name].reads_params):
                    why = "samples nothing" if name in demand else "does not run for this request"
                    raise InvalidRequestError(
                        f"params[{name!r}]: got {_words(params)}, but the stage {why}; leave it out"
                    )
        elif given is not None and _words(given):
            types = {self._specs[name].params_type for name in demand if self._specs[name].reads_params}
            if not isinstance(given, tuple(types)):
                expected = " or ".join(sorted(kind.__name__ for kind in types)) or "none"
                raise InvalidRequestError(
                    f"params: got {_words(given)}, which no stage of this request reads; expected {expected}"
                )

    def _needed_inputs(self, name: str, request: OmniRequest, params: StageParams) -> frozenset[str]:
        """Of a stage that goes on none: what it was given is saved with it."""
        if name in request.saved:
            return frozenset()
        with stage_boundary(name):
            return self._specs[name].needed_inputs(request, params)


def _resolve(request: OmniRequest, spec: StageSpec) -> StageParams:
    defaults = spec.defaults
    if request.negative_prompt is not None:  # it stands beside the parameters, and above their defaults too
        defaults = {name: value for name, value in defaults.items() if name != "negative_prompt"}
    with stage_boundary(spec.stage.name):
        return request.params_for(spec.stage.name, spec.params_type).with_defaults(defaults)


def _check_loras(spec: StageSpec, params: StageParams) -> None:
    if loras_of(params) and spec.reads_params and not spec.takes_loras:
        name = spec.stage.name
        raise InvalidRequestError(
            f"lora: stage {name!r} has none; set its lora.folders in the config, or name the stage that has: params ="
            " {stage: parameters}"
        )


def _with_negative_defaults(request: OmniRequest, params: Mapping[str, StageParams]) -> OmniRequest:
    """The request with a negative prompt that a diffusion stage has by default, which another stage may read for it."""
    given = request.params.values() if isinstance(request.params, Mapping) else [request.params]
    is_said = any(isinstance(each, DiffusionParams) and each.negative_prompt is not None for each in given)
    found = (each.negative_prompt for each in params.values() if isinstance(each, DiffusionParams))
    default = next((text for text in found if text is not None), None)
    if is_said or request.negative_prompt is not None or default is None:
        return request
    return dataclasses.replace(request, negative_prompt=default)


def _request_seed(request: OmniRequest) -> int:
    """What stages draw from that have no seed of their own: the first one of the request, else one that is drawn. So a
    request can be made again with a single number.
    """
    given = request.params.values() if isinstance(request.params, Mapping) else [request.params]
    seeds = (each.seed for each in given if isinstance(each, SamplingParams | DiffusionParams))
    seed = next((each for each in seeds if each is not None), None)
    return draw_seed() if seed is None else seed


def _seed(spec: StageSpec, params: StageParams, request_seed: int) -> int | None:
    if not isinstance(params, SamplingParams | DiffusionParams) or not spec.draws(params):
        return None
    return request_seed if params.seed is None else params.seed


def _guarded_cache_key(spec: StageSpec) -> Callable[[StageTask], str | None]:
    def cache_key(task: StageTask) -> str | None:
        with stage_boundary(spec.stage.name):
            return spec.cache_key(task)

    return cache_key


def _words(params: StageParams) -> str:
    """'SamplingParams with seed, n' for those that are set; '' where none is."""
    names = [field.name for field in dataclasses.fields(params) if getattr(params, field.name) is not None]
    return f"{type(params).__name__} with {', '.join(names)}" if names else ""


def _checked_size(stage: str, size: float) -> float:
    check_number(f"stage {stage!r}: job_size", size, 0, raises=StageError)
    return size
