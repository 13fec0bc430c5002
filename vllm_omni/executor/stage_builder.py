"""From the name of a stage to an executor for it, as often as one is asked for: at load, and when a stage is rebuilt.

Owns the loaded models, which outlive the engines that read them. Loads nothing itself.
"""

from __future__ import annotations

from torch import device as Device

from vllm_omni import registry
from vllm_omni.config.graph import Edge
from vllm_omni.config.schema import PROCESS, StageConfig
from vllm_omni.engine.base import EngineContext
from vllm_omni.executor.base import StageExecutor
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.homes import Home, home_of
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.device import current_threads, is_cpu, is_cuda, is_same_device, resolve_device
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool


class StageBuilder:
    """Of one pipeline."""

    def __init__(self, pipeline: Pipeline, background: Background, commons: Commons) -> None:
        self.models = ModelPool()
        # by stage, of each replica
        self.devices: dict[str, tuple[Device, ...]] = {
            name: tuple(map(resolve_device, spec.stage.replica_devices)) for name, spec in pipeline.specs.items()
        }
        self._pipeline = pipeline
        self._background = background
        self._commons = commons

    def build(self, name: str, replica: int = 0) -> StageExecutor:
        """An executor of its own for a replica of a stage, not started."""
        spec = self._pipeline.specs[name]
        executor: type[StageExecutor] = registry.resolve("executor", self._executor_of(spec.stage))
        return executor(spec, self.context(name, replica), self._commons, self.blueprint(name, replica))

    def context(self, name: str, replica: int = 0) -> EngineContext:
        """What the engine of a replica is given besides the spec of its stage."""
        spec = self._pipeline.specs[name]
        return EngineContext(
            device=self.devices[name][replica],
            dtype=spec.precision.dtype,
            models=self.models,
            background=self._background,
            reads=self._pipeline.reads[name],
            limits=self._pipeline.config.limits,
            dit_cache=self._pipeline.config.dit_cache,
            replica=replica,
        )

    def blueprint(self, name: str, replica: int = 0) -> StageBlueprint:
        """What an engine of this replica in another process is made of."""
        context = self.context(name, replica)
        return StageBlueprint(
            self._pipeline.config,
            name,
            self._pipeline.folders.fetched,
            self._pipeline.granted_bytes.get(name),
            context.reads,
            context.device,
            context.dtype,
            self._threads(context.device),
            self._ports_on_device(name, context.device),
        )

    def _ports_on_device(self, name: str, device: Device) -> frozenset[str]:
        """The output ports of a stage whose tensors nobody reads but other processes on this CUDA device."""
        graph = self._pipeline.graph
        if not is_cuda(device) or name in graph.result_stages:
            return frozenset()
        listed = {port for stage, port in graph.output_tensors if stage == name}
        elsewhere = {edge.source_port for edge in graph.edges_from(name) if not self._reads_on(edge, device)}
        return graph.wanted_ports(name) - listed - elsewhere

    def _reads_on(self, edge: Edge, device: Device) -> bool:
        is_whole = edge.stream is None and not edge.takes_chunks and not edge.is_text
        is_process = self._executor_of(self._pipeline.specs[edge.target].stage) == PROCESS
        return is_whole and is_process and all(is_same_device(device, each) for each in self.devices[edge.target])

    def _threads(self, device: Device) -> int | None:
        """Processes that compute on the CPU share its cores out: with more threads than cores each waits for others."""
        if not is_cpu(device):
            return None
        homes: set[Home | None] = set()
        for name, devices in self.devices.items():
            stage = self._pipeline.specs[name].stage
            homes |= {home_of(stage, number) for number, each in enumerate(devices) if is_cpu(each)}
        return max(1, current_threads() // len(homes))

    def _executor_of(self, stage: StageConfig) -> str:
        """Stages on several devices, and several replicas, have a thread each, so that none waits for another."""
        if stage.executor != "auto":
            return stage.executor
        num_devices = len({device for devices in self.devices.values() for device in devices})
        return "thread" if num_devices > 1 or stage.replicas > 1 else "inline"
