"""What a monitor reads at `/metrics`. Requests are counted as they end; gauges are read from the engines now and then,
never so that an answer waits for a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_omni.entrypoints.server.models import ModelTable, ServedModel
from vllm_omni.entrypoints.server.runs import Run, RunTable

REFRESH_S = 1.0  # how old what is known of the engines may be
PATIENCE_S = 0.02  # how long an answer waits for something newer
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4, 8, 16)
COUNTS = {
    **{"prompt_tokens": "prompt", "tokens": "generated", "cache_hits": "cached"},
    **{"drafted_tokens": "drafted", "accepted_tokens": "accepted"},
}
PROCESS_GAUGES = {  # of the library's collector -> our name and what it is
    "process_resident_memory_bytes": ("resident_bytes", "Resident memory of the processes apart that stages have"),
    "process_cpu_seconds": ("cpu_seconds", "CPU time of the processes apart that stages have now"),
}
GAUGES = {  # of an engine's own counters and gauges -> our name and what it is
    "num_running": ("stage_sequences_running", "Sequences or samples in the stage's batch"),
    "num_waiting": ("stage_sequences_waiting", "Sequences or samples that wait in the stage"),
    "num_blocks": ("kv_blocks", "Blocks of the KV pool"),
    "num_free_blocks": ("kv_blocks_free", "Free blocks of the KV pool"),
    "num_touched_blocks": ("kv_blocks_touched", "Blocks of the KV pool that were ever used, and so have memory"),
    "kv_pool_bytes": ("kv_pool_bytes", "Bytes of the KV pool"),
    "num_preemptions": ("preemptions", "Sequences that lost their blocks, since loading"),
}


class ServerMetrics:
    """Everything that is counted; observes a RunTable."""

    def __init__(self, models: ModelTable, runs: RunTable) -> None:
        self._models = models
        self._registry = CollectorRegistry()
        self._snapshots: dict[str, Mapping[str, Any]] = {}
        self._refreshed_s = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_Gauges(models, runs, self._snapshots))
        by_route, by_stage = ("model", "route"), ("model", "stage")
        self._requests = self._counter("requests", "Requests by their end", (*by_route, "status"))
        self._seconds = self._histogram("request_seconds", "From arrival to the end", by_route, SECONDS)
        self._first = self._histogram(
            "first_part_seconds", "From arrival to the first words, preview or sound", (*by_route, "kind"), SECONDS
        )
        self._queued = self._histogram("queue_seconds", "From arrival to the first stage's start", ("model",), SECONDS)
        self._stage_seconds = self._histogram("stage_seconds", "A request in a stage", by_stage, SECONDS)
        self._steps = self._counter("stage_steps", "Steps: tokens or denoising steps", by_stage)
        self._tokens = self._counter("tokens", "Tokens by what became of them", (*by_stage, "kind"))
        self._step_cache = self._counter("step_cache_hits", "Denoising steps that a step cache saved", by_stage)
        self._factor = self._histogram(
            "real_time_factor", "Seconds of work for each second of sound", ("model",), RATIOS
        )
        runs.observers.append(self.observe)

    async def render(self) -> bytes:
        """The text format of Prometheus."""
        if time.monotonic() - self._refreshed_s > REFRESH_S:
            if self._refreshing is None or self._refreshing.done():
                self._refreshing = asyncio.ensure_future(self._refresh())
            await asyncio.wait({self._refreshing}, timeout=PATIENCE_S)
        return generate_latest(self._registry)

    def observe(self, run: Run) -> None:
        """Counts a run that has ended."""
        labels = (run.model.name, run.route)
        status = "cancelled" if run.output is None else run.output.status.value
        self._requests.labels(*labels, status).inc()
        self._seconds.labels(*labels).observe((run.ended_s or run.began_s) - run.began_s)
        if run.first_part_s is not None and run.wants_parts:
            self._first.labels(*labels, run.first_kind).observe(run.first_part_s - run.began_s)
        if run.output is None:
            return
        starts = [values["started_s"] for values in run.output.metrics.values() if "started_s" in values]
        if starts:
            self._queued.labels(run.model.name).observe(min(starts))
        for stage, values in run.output.metrics.items():
            self._count_stage(run.model, stage, values)
        audio_s = sum(audio.duration_s for audio in run.output.audios)
        if audio_s > 0 and run.ended_s is not None:
            self._factor.labels(run.model.name).observe((run.ended_s - run.began_s) / audio_s)

    def _count_stage(self, model: ServedModel, stage: str, values: Mapping[str, Any]) -> None:
        if "ran_s" in values:
            self._stage_seconds.labels(model.name, stage).observe(values["ran_s"])
        self._steps.labels(model.name, stage).inc(values.get("steps", 0))
        if "tokens" not in values:
            self._step_cache.labels(model.name, stage).inc(values.get("cache_hits", 0))
            return
        for name, kind in COUNTS.items():
            self._tokens.labels(model.name, stage, kind).inc(values.get(name, 0))

    async def _refresh(self) -> None:
        for model in self._models:
            if model.is_loaded:
                self._snapshots[model.name] = await model.omni.get_metrics()
        self._refreshed_s = time.monotonic()

    def _counter(self, name: str, words: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"vllm_omni_{name}", words, labels, registry=self._registry)

    def _histogram(self, name: str, words: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm_omni_{name}", words, labels, buckets=buckets, registry=self._registry)


class _Gauges(Collector):
    """What is so at the moment."""

    def __init__(self, models: ModelTable, runs: RunTable, snapshots: Mapping[str, Mapping[str, Any]]) -> None:
        self._models = models
        self._runs = runs
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        served = GaugeMetricFamily("vllm_omni_requests_served", "Requests that are being served", labels=["model"])
        waiting = GaugeMetricFamily("vllm_omni_requests_waiting", "Requests in the queue", labels=["model"])
        running = GaugeMetricFamily("vllm_omni_requests_running", "Requests that run", labels=["model"])
        alive = GaugeMetricFamily("vllm_omni_stage_alive", "1 for a stage that answers", labels=["model", "stage"])
        tasks = GaugeMetricFamily("vllm_omni_stage_tasks", "Requests in a stage", labels=["model", "stage"])
        retries = GaugeMetricFamily(
            "vllm_omni_stage_retries", "Tasks that were run again, since loading", labels=["model", "stage"]
        )
        by_replica = ["model", "stage", "replica"]
        alive_replicas = GaugeMetricFamily("vllm_omni_replica_alive", "1 for a replica that answers", labels=by_replica)
        work = GaugeMetricFamily("vllm_omni_replica_outstanding", "Work of unfinished tasks", labels=by_replica)
        for model in self._models:
            served.add_metric([model.name], sum(run.model is model for run in self._runs.living))
            status = model.get_status()
            if status is not None:
                waiting.add_metric([model.name], status["queue_size"])
                running.add_metric([model.name], status["running_requests"])
                for stage, about in status["stages"].items():
                    alive.add_metric([model.name, stage], float(about["alive"]))
                    tasks.add_metric([model.name, stage], about["tasks"])
                    retries.add_metric([model.name, stage], about["num_retries"])
                    for number, replica in enumerate(about["replicas"]):
                        alive_replicas.add_metric([model.name, stage, str(number)], float(replica["alive"]))
                        work.add_metric([model.name, stage, str(number)], replica["outstanding"])
        loop_tasks = GaugeMetricFamily("vllm_omni_event_loop_tasks", "Tasks of the server's event loop")
        loop_tasks.add_metric([], len(asyncio.all_tasks()))
        yield from (served, waiting, running, alive, tasks, retries, alive_replicas, work, loop_tasks)
        yield from self._of_processes()
        yield from self._of_engines()

    def _of_processes(self) -> Iterator[Metric]:
        """Those apart from the server's, which stages may share; nothing where the system does not tell."""
        families = {
            source: GaugeMetricFamily(f"vllm_omni_stage_processes_{name}", words, labels=["model"])
            for source, (name, words) in PROCESS_GAUGES.items()
        }
        for model in self._models:
            stages = (model.get_status() or {}).get("stages", {}).values()
            pids = {replica.get("pid") for stage in stages for replica in stage["replicas"]} - {None}
            found = [
                metric for pid in pids for metric in ProcessCollector(registry=None, pid=partial(int, pid)).collect()
            ]
            for source, family in families.items():
                told = [metric.samples[0].value for metric in found if metric.name == source]
                if told or not pids:
                    family.add_metric([model.name], sum(told))
        yield from families.values()

    def _of_engines(self) -> Iterator[Metric]:
        for key, (name, words) in GAUGES.items():
            family = GaugeMetricFamily(f"vllm_omni_{name}", words, labels=["model", "stage"])
            for model, snapshot in self._snapshots.items():
                for stage, stats in snapshot["stages"].items():
                    if key in stats:
                        family.add_metric([model, stage], stats[key])
            yield family
        dtypes = InfoMetricFamily(
            "vllm_omni_stage_dtype", "What a stage computes in, and why", labels=["model", "stage"]
        )
        kernels = InfoMetricFamily("vllm_omni_stage_kernels", "What a stage computes with", labels=["model", "stage"])
        edges = GaugeMetricFamily(
            "vllm_omni_edge_bytes", "Bytes that went over an edge, since loading", labels=["model", "edge"]
        )
        hits = GaugeMetricFamily(
            "vllm_omni_prompt_cache_hit_rate", "Of the cache of prompt embeddings", labels=["model"]
        )
        for model, snapshot in self._snapshots.items():
            for stage, chosen in snapshot["dtypes"].items():
                dtypes.add_metric([model, stage], chosen)
            for stage, stats in snapshot["stages"].items():
                if "kernels" in stats:
                    kernels.add_metric([model, stage], stats["kernels"])
            for edge, stats in snapshot["edges"].items():
                edges.add_metric([model, edge], stats["bytes"])
            hits.add_metric([model], snapshot["prompt_embeds"].get("hit_rate", 0.0))
        yield from (dtypes, kernels, edges, hits)
