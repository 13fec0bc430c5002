"""What `vllm-omni check` shows: the DAG, the ports, the dtypes and the memory plan of a config. Loads no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.config.schema import OmniConfig, StreamConfig
from vllm_omni.core.routing.budgets import GIB, MIB, format_bytes
from vllm_omni.engine.base import MemoryPlan
from vllm_omni.entrypoints.cli.text_table import aligned
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.layers.native.library import built_variants


def describe(pipeline: Pipeline, plans: Mapping[str, MemoryPlan]) -> str:
    """The whole report, as lines of plain text. plans: of `plan_memory`."""
    config, graph = pipeline.config, pipeline.graph
    model = f"  {config.model}" if config.model else ""
    notes, memory = [*_dtypes(pipeline, plans), *_notes(pipeline)], _memory(config, plans)
    drawing = [*draw_graph(config, graph), *_idle(graph)]
    return "\n".join([f"{config.name}{model}", "", *drawing, "", "Ports", *_ports(graph), "", *notes, *memory])


def as_json(pipeline: Pipeline, plans: Mapping[str, MemoryPlan]) -> dict[str, Any]:
    """The same as plain values, sizes in bytes."""
    config, graph = pipeline.config, pipeline.graph
    stages = {
        name: {
            "kind": config.stages[name].kind,
            "model": config.stages[name].model,
            "executor": config.stages[name].executor,
            "inputs": {edge.target_port: f"{edge.source}.{edge.source_port}" for edge in graph.edges_into(name)},
            "results": sorted(graph.signatures[name].results),
            "dtype": pipeline.specs[name].precision.name,
            "dtype_reason": pipeline.specs[name].precision.reason,
            "note": pipeline.specs[name].note(),
            "memory": {**dataclasses.asdict(plans[name]), "total_bytes": plans[name].total_bytes},
        }
        for name in graph.order
    }
    return {
        "name": config.name,
        "model": config.model,
        "outputs": list(graph.outputs),
        "not_loaded": list(graph.idle),
        "stages": stages,
        "budget_bytes": int(config.max_memory_gb * GIB),
    }


def draw_graph(config: OmniConfig, graph: StageGraph) -> list[str]:
    """One line a stage, in the order of running, with the edges as rails on the left; conditions and streams stand
    above the stage that they keep waiting.
    """
    rails = _Rails()
    rows: list[tuple[str, str]] = []
    for stage in graph.order:
        rows += [(line, "") for line in rails.merge(stage)]
        rows += [(rails.passing(), remark) for remark in _remarks(graph, stage)]
        rows.append((rails.node(stage), _label(config, graph, stage)))
        targets = dict.fromkeys(edge.target for edge in graph.edges_from(stage))
        rows += [(line, "") for line in rails.branch(stage, list(targets))]
    return aligned(rows)


def _idle(graph: StageGraph) -> list[str]:
    return [f"not loaded, since no output calls for them: {', '.join(graph.idle)}"] if graph.idle else []


def _label(config: OmniConfig, graph: StageGraph, stage: str) -> str:
    section = config.stages[stage]
    words = [stage, section.kind, *([section.model] if section.model else [])]
    words += [f"executor {section.executor}"] if section.executor != "auto" else []
    given = [output for output in graph.outputs if output.partition(".")[0] == stage]
    return " · ".join(words) + (f"  => {', '.join(given)}" if given else "")


def _remarks(graph: StageGraph, stage: str) -> Iterable[str]:
    for edge in graph.edges_into(stage):
        if edge.when is not None:
            yield f"{edge.source}.{edge.source_port} -> {edge.target_port}  when {edge.when}"
        if edge.stream is not None:
            yield f"{edge.source}.{edge.source_port} ⇶ {edge.target_port}  {_rhythm(edge.stream)}"


def _rhythm(stream: StreamConfig) -> str:
    """'4, 25 … rows, 25 before, 12 after': the first chunk, all others, the context that they bring along."""
    sizes = dict.fromkeys((stream.first_chunk, stream.chunk))
    contexts = {"before": stream.left_context, "after": stream.look_ahead}
    words = [f"{', '.join(map(str, sizes))} … rows", *(f"{rows} {side}" for side, rows in contexts.items() if rows)]
    return ", ".join(words)


class _Rails:
    """Which column an edge runs down in: `_lanes[i]` is the stage that the edge in column i leads to."""

    def __init__(self) -> None:
        self._lanes: list[str | None] = []

    def merge(self, stage: str) -> list[str]:
        """Joins the edges into a stage in the leftmost of their columns."""
        first, *rest = self._columns(stage) or [0]
        line = self._line(first, rest, "├", "┴", "╯")
        for column in rest:
            self._lanes[column] = None
        return [line] if rest else []

    def node(self, stage: str) -> str:
        """The stage itself, in its edges' column or in a free one."""
        column = (self._columns(stage) or [self._free_column(0)])[0]
        self._lanes[column] = stage
        return self._line(column, [], "●", "", "")

    def passing(self) -> str:
        """A line on which nothing branches."""
        return "".join("  " if target is None else "│ " for target in self._lanes).rstrip()

    def branch(self, stage: str, targets: Sequence[str]) -> list[str]:
        """Opens a column for every edge out of a stage; its own goes to the first."""
        column = self._columns(stage)[0]
        self._lanes[column] = targets[0] if targets else None
        others = []
        for target in targets[1:]:
            others.append(self._free_column(column + 1))
            self._lanes[others[-1]] = target
        line = self._line(column, sorted(others), "├", "┬", "╮")
        while self._lanes and self._lanes[-1] is None:
            self._lanes.pop()
        return [line] if others else []

    def _columns(self, stage: str) -> list[int]:
        return [column for column, target in enumerate(self._lanes) if target == stage]

    def _free_column(self, start: int) -> int:
        for column in range(start, len(self._lanes)):
            if self._lanes[column] is None:
                return column
        self._lanes.append(None)
        return len(self._lanes) - 1

    def _line(self, first: int, others: Sequence[int], mark: str, middle: str, last: str) -> str:
        """`mark` in column `first`, joined by a horizontal line with `others`; rails in the other columns."""
        end = others[-1] if others else first
        text = ""
        for column, target in enumerate(self._lanes):
            is_between = first < column < end
            if column == first:
                text += mark
            elif column in others:
                text += last if column == end else middle
            elif target is None:
                text += "─" if is_between else " "
            else:
                text += "┼" if is_between else "│"
            text += "─" if first <= column < end else " "
        return text.rstrip()


def _ports(graph: StageGraph) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for stage in graph.order:
        signature = graph.signatures[stage]
        sources = {
            edge.target_port: f"{edge.source}.{edge.source_port}{_how(edge)}" for edge in graph.edges_into(stage)
        }
        for port, spec in signature.inputs.items():
            rows.append((stage, "in", port, str(spec), f"<- {sources[port]}" if port in sources else "not connected"))
        for port, spec in signature.outputs.items():
            rows.append((stage, "out", port, str(spec), ", ".join(_readers(graph, stage, port)) or "not computed"))
    return aligned(rows)


def _how(edge: Edge) -> str:
    if edge.stream is not None:
        return f" ⇶ {_rhythm(edge.stream)}"
    return "" if edge.when is None else f" when {edge.when}"


def _readers(graph: StageGraph, stage: str, port: str) -> Iterable[str]:
    for edge in graph.edges_from(stage):
        if edge.source_port == port:
            yield f"-> {edge.target}.{edge.target_port}{_how(edge)}"
    if stage in graph.result_stages and port in graph.signatures[stage].results:
        yield "=> result"
    if (stage, port) in graph.output_tensors:
        yield "=> tensor"


def _dtypes(pipeline: Pipeline, plans: Mapping[str, MemoryPlan]) -> list[str]:
    """Of the stages that hold something."""
    rows = [(name, str(pipeline.specs[name].precision)) for name, plan in plans.items() if plan.total_bytes]
    kernels = f"CPU kernels: {next(iter(built_variants()), 'none are built for this processor; torch computes alone')}"
    return ["Dtypes", *aligned(rows), f"  {kernels}", ""] if rows else []


def _notes(pipeline: Pipeline) -> list[str]:
    notes = {name: spec.note() for name, spec in pipeline.specs.items()}
    rows = [(name, note) for name, note in notes.items() if note]
    return ["Notes", *aligned(rows), ""] if rows else []


def _memory(config: OmniConfig, plans: Mapping[str, MemoryPlan]) -> list[str]:
    embeds_bytes = int(config.dit_cache.prompt_embeds_mb * MIB)
    total = sum(plan.total_bytes for plan in plans.values()) + embeds_bytes
    rows = [("", "weights", "KV pool", "activations", "step cache", "decoding", "total")]
    for stage, plan in plans.items():
        caches = (plan.activation_bytes, plan.step_cache_bytes, plan.decoding_bytes)
        sizes = (plan.weights_bytes, plan.kv_pool_bytes, *caches, plan.total_bytes)
        rows.append((stage, *(format_bytes(size) if size else "-" for size in sizes)))  # type: ignore[arg-type]
    rows.append(("prompt embeddings", "", "", "", "", "", format_bytes(embeds_bytes) if embeds_bytes else "-"))
    rows.append(("all", "", "", "", "", "", format_bytes(total)))
    budget = format_bytes(int(config.max_memory_gb * GIB))
    remarks = [(stage, plan.remark) for stage, plan in plans.items() if plan.remark]
    remarks += [
        (stage, f"{format_bytes(plan.offloaded_bytes)} of weights wait in the host's memory and come block by block")
        for stage, plan in plans.items()
        if plan.offloaded_bytes
    ]
    return [
        "Memory",
        *aligned(rows),
        *aligned(remarks),
        f"  budget {budget} (resources.max_memory_gb); weights that stages share count once",
    ]
