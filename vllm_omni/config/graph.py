"""The DAG of stages: edges from `inputs`, checked against the stages' signatures.

Pure: knows names and ports, no engine and no request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_omni.config.condition import Condition
from vllm_omni.config.document import check_stage_name
from vllm_omni.config.schema import OmniConfig, StageConfig, StreamConfig
from vllm_omni.errors import ConfigError
from vllm_omni.payload import PortSpec, StageSignature, TensorSpec, TextSpec
from vllm_omni.utils.checks import did_you_mean

CALLER = "(caller)"  # the source of what a request brings while it runs; no stage can have this name


@dataclass(frozen=True, slots=True)
class Edge:
    """`source.source_port` feeds `target.target_port`."""

    source: str
    source_port: str
    target: str
    target_port: str
    when: Condition | None = None  # on the meta of the source's payload; None for always
    is_text: bool = field(default=False, compare=False)  # text passes, which a stage may leave unwritten
    stream: StreamConfig | None = None  # how rows are handed on while they are being made; None: the port whole
    takes_chunks: bool = field(default=False, compare=False)  # the reader gets StreamChunks, even of a whole port

    @property
    def origin(self) -> tuple[str, str]:
        """What is read: a stage and one of its output ports."""
        return (self.source, self.source_port)

    def __str__(self) -> str:
        return f"{self.source}.{self.source_port} -> {self.target}.{self.target_port}"


class StageGraph:
    """A checked DAG; never changes. All stages are checked, but those that no output calls for are left out of it.

    idle: the names of those. order: stage names, each after all that feed it (among equals, in the order of the
    config). edges, signatures: all that belong to these.
    outputs: as the config lists them. result_stages: those outputs that name a stage (its final text, images or audio).
    output_tensors: those that name a tensor, as (stage, port).
    """

    def __init__(
        self, stages: Mapping[str, StageConfig], signatures: Mapping[str, StageSignature], outputs: Sequence[str]
    ) -> None:
        """Raises ConfigError naming the key, what it got and what was expected."""
        for name in stages:
            check_stage_name(name)
        self.signatures = dict(signatures)
        self._connect(stages, _read_edges(stages, signatures))
        self._check_required_inputs()
        self.order = self._sorted()
        self.outputs = tuple(outputs)
        self.result_stages, self.output_tensors = _read_outputs(self.outputs, signatures)
        self._ends = frozenset(self.result_stages) | {stage for stage, _ in self.output_tensors}
        called_for = self._called_for()
        self.idle = tuple(stage for stage in stages if stage not in called_for)
        self.order = tuple(stage for stage in self.order if stage in called_for)
        self.signatures = {stage: signatures[stage] for stage in self.order}
        self._connect(self.order, [edge for edge in self.edges if edge.target in called_for])

    def edges_into(self, stage: str) -> tuple[Edge, ...]:
        """What feeds a stage, in the order of its `inputs`."""
        return self._into[stage]

    def edges_from(self, stage: str) -> tuple[Edge, ...]:
        """What a stage feeds."""
        return self._from[stage]

    def before(self, stages: Collection[str]) -> frozenset[str]:
        """The stages that any of these depends on, directly or not."""
        found: set[str] = set()
        for stage in reversed(self.order):
            if stage in stages or stage in found:
                found |= {edge.source for edge in self._into[stage]}
        return frozenset(found)

    def wanted_ports(self, stage: str) -> frozenset[str]:
        """The output ports of a stage that an edge or `outputs` reads whole."""
        wanted = {edge.source_port for edge in self._from[stage] if edge.stream is None}
        wanted |= {port for source, port in self.output_tensors if source == stage}
        if stage in self.result_stages:
            wanted |= self.signatures[stage].results
        return frozenset(wanted)

    def streamed_ports(self, stage: str) -> frozenset[str]:
        """The output ports of a stage that somebody reads row by row: an edge, or the caller where `outputs` lists the
        stage.
        """
        ports = {edge.source_port for edge in self._from[stage] if edge.stream is not None}
        if stage in self.result_stages:
            ports |= self.signatures[stage].results & self.signatures[stage].streamed_outputs
        return frozenset(ports)

    def demand(
        self, needed: Callable[[str], frozenset[str]], outputs: Sequence[str] | None = None
    ) -> Mapping[str, frozenset[str]]:
        """Which stages run for one request, in topological order, and which of their connected inputs they read.

        needed: stage -> the input ports that the request makes it read (StageSpec.needed_inputs), asked of running
        stages alone. outputs: entries of the graph's own; None for all. A stage runs when `outputs` lists it or when a
        running stage reads one of its edges.
        """
        ends = {entry.partition(".")[0] for entry in (self.outputs if outputs is None else outputs)}
        reads: dict[str, frozenset[str]] = {}
        for stage in reversed(self.order):
            is_read = any(edge.target_port in reads.get(edge.target, ()) for edge in self._from[stage])
            if is_read or stage in ends:
                reads[stage] = needed(stage) & {edge.target_port for edge in self._into[stage]}
        return {stage: reads[stage] for stage in self.order if stage in reads}

    def without_idle(self, config: OmniConfig) -> OmniConfig:
        """The configuration that this graph is of, with the stages of `order` alone: what is to be loaded."""
        return dataclasses.replace(config, stages={n: s for n, s in config.stages.items() if n not in self.idle})

    def _connect(self, stages: Collection[str], edges: Sequence[Edge]) -> None:
        self.edges = tuple(edges)
        self._into: dict[str, tuple[Edge, ...]] = {s: tuple(e for e in edges if e.target == s) for s in stages}
        self._from: dict[str, tuple[Edge, ...]] = {s: tuple(e for e in edges if e.source == s) for s in stages}

    def _check_required_inputs(self) -> None:
        for stage, edges in self._into.items():
            signature = self.signatures[stage]
            missing = signature.required_inputs - {edge.target_port for edge in edges}
            if missing:
                port = sorted(missing)[0]
                spec = signature.inputs.get(port)
                raise ConfigError(f"stages.{stage}.inputs.{port}: missing; expected '<stage>.<port>' that gives {spec}")

    def _sorted(self) -> tuple[str, ...]:
        order: list[str] = []
        waiting = dict.fromkeys(self._into)
        while waiting:
            ready = [stage for stage in waiting if not any(edge.source in waiting for edge in self._into[stage])]
            if not ready:
                raise ConfigError(f"stages: the edges form a cycle: {' -> '.join(self._find_cycle(waiting))}")
            order.append(ready[0])
            del waiting[ready[0]]
        return tuple(order)

    def _find_cycle(self, waiting: Mapping[str, None]) -> list[str]:
        """Every waiting stage has a waiting source, so walking upwards must come back."""
        path = [next(iter(waiting))]
        while path[-1] not in path[:-1]:
            path.append(next(edge.source for edge in self._into[path[-1]] if edge.source in waiting))
        return path[path.index(path[-1]) :][::-1]

    def _called_for(self) -> frozenset[str]:
        """The stages that `outputs` lists, and all that feed these."""
        found = set(self._ends)
        for stage in reversed(self.order):
            if any(edge.target in found for edge in self._from[stage]):
                found.add(stage)
        return frozenset(found)


def _read_edges(stages: Mapping[str, StageConfig], signatures: Mapping[str, StageSignature]) -> list[Edge]:
    edges = []
    for target, stage in stages.items():
        for port, given in stage.edges.items():
            key = f"stages.{target}.inputs.{port}"
            expected = signatures[target].inputs.get(port)
            if expected is None:
                raise ConfigError(
                    f"{key}: a {stage.kind!r} stage has no such input{_near(port, signatures[target].inputs)}"
                )
            source, source_port = _read_port(given.source, signatures, key)
            if source == target:
                raise ConfigError(f"{key}: got {given.source!r}, its own output; expected another stage's")
            _check_fit(signatures[source].outputs[source_port], expected, given.source, key)
            condition = given.condition()
            _check_names(condition, source, signatures[source], key)
            takes_chunks = port in signatures[target].streamed_inputs
            is_text = isinstance(expected, TextSpec)
            edge = Edge(source, source_port, target, port, condition, is_text, given.stream, takes_chunks)
            _check_stream(edge, signatures, f"{key}.stream")
            edges.append(edge)
    return edges


def _read_port(origin: str, signatures: Mapping[str, StageSignature], key: str) -> tuple[str, str]:
    source, dot, port = origin.partition(".")
    if source not in signatures:
        raise ConfigError(f"{key}: got {origin!r}, but there is no stage {source!r}{did_you_mean(source, signatures)}")
    outputs = signatures[source].outputs
    if not dot:
        raise ConfigError(
            f"{key}: got {origin!r}, expected '<stage>.<port>'{_near('', [f'{source}.{p}' for p in outputs])}"
        )
    if port not in outputs:
        raise ConfigError(f"{key}: got {origin!r}, but {source!r} has no output {port!r}{_near(port, outputs)}")
    return source, port


def _check_names(condition: Condition | None, source: str, signature: StageSignature, key: str) -> None:
    """Refuses a name that would be None for ever, where the source says what its meta holds."""
    if condition is None or signature.meta is None:
        return
    known = signature.meta | {port for port, spec in signature.outputs.items() if not isinstance(spec, TensorSpec)}
    for name in sorted(condition.names - known):
        raise ConfigError(f"{key}.when: got {name!r}, but the meta of {source!r} has no such key{_near(name, known)}")


def _check_stream(edge: Edge, signatures: Mapping[str, StageSignature], key: str) -> None:
    """Refuses a stream that the source cannot give or the reader cannot take."""
    if edge.stream is None:
        return
    given, taken = signatures[edge.source].streamed_outputs, signatures[edge.target].streamed_inputs
    if edge.source_port not in given:
        raise ConfigError(
            f"{key}: {edge.source!r} gives {edge.source_port!r} only whole; remove `stream`{_or_one_of('read', given)}"
        )
    if edge.target_port not in taken:
        raise ConfigError(
            f"{key}: {edge.target!r} reads {edge.target_port!r} only whole; remove `stream`{_or_one_of('feed', taken)}"
        )


def _or_one_of(verb: str, ports: Collection[str]) -> str:
    return f", or {verb} a port that streams: {', '.join(sorted(ports))}" if ports else ""


def _near(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, known) or " (it has none)"


def _check_fit(given: PortSpec, expected: PortSpec, origin: str, key: str) -> None:
    if not expected.fits(given):
        raise ConfigError(f"{key}: {origin} gives {_words(given)}, expected {_words(expected)}")


def _words(spec: PortSpec) -> str:
    return f"a tensor {spec}" if isinstance(spec, TensorSpec) else str(spec)


def _listing_instead(stage: str, spec: PortSpec) -> str:
    return f"list the stage itself: {stage!r}" if isinstance(spec, TextSpec) else "list stages or tensors"


def _read_outputs(
    outputs: Sequence[str], signatures: Mapping[str, StageSignature]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    if not outputs:
        raise ConfigError("outputs: got nothing, expected a list of stages or '<stage>.<port>'")
    results: list[str] = []
    tensors: list[tuple[str, str]] = []
    for index, output in enumerate(outputs):
        key = f"outputs[{index}]"
        if output in outputs[:index]:
            raise ConfigError(f"{key}: got {output!r} a second time")
        if "." in output:
            stage, port = _read_port(output, signatures, key)
            spec = signatures[stage].outputs[port]
            if not isinstance(spec, TensorSpec):
                raise ConfigError(f"{key}: got {output!r}, which is {spec}; {_listing_instead(stage, spec)}")
            tensors.append((stage, port))
        elif output not in signatures:
            raise ConfigError(f"{key}: got {output!r}, but there is no such stage{did_you_mean(output, signatures)}")
        elif not signatures[output].results:
            ports = [f"{output}.{port}" for port in signatures[output].outputs]
            raise ConfigError(
                f"{key}: got {output!r}, a stage without a result of its own; list a port{_near('', ports)}"
            )
        else:
            results.append(output)
    return tuple(results), tuple(tensors)
