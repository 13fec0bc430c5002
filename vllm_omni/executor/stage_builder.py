"""From the name of a stage to an executor for it, as often as one is asked for: at load, and when a stage is rebuilt.

Owns the loaded models, which outlive the engines that read them. Loads nothing itself.
"""

from __future__ import annotations

from torch import device as Device

from vllm_omni import registry
from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.base import EngineContext
from vllm_omni.executor.base import StageExecutor, runs_apart
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.commons import Commons
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.device import current_threads, is_cpu, resolve_device
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool


class StageBuilder:
    """Of one pipeline."""

    def __init__(self, pipeline: Pipeline, background: Background, commons: Commons) -> None:
        self.models = ModelPool()
        self.devices: dict[str, Device] = {
            name: resolve_device(spec.stage.device) for name, spec in pipeline.specs.items()
        }
        self._pipeline = pipeline
        self._background = background
        self._commons = commons

    def build(self, name: str) -> StageExecutor:
        """An executor of its own, not started."""
        spec = self._pipeline.specs[name]
        executor: type[StageExecutor] = registry.resolve("executor", self._executor_of(spec.stage))
        return executor(spec, self.context(name), self._commons, self.blueprint(name))

    def context(self, name: str) -> EngineContext:
        """What the engine of a stage is given besides its spec."""
        spec = self._pipeline.specs[name]
        return EngineContext(
            device=self.devices[name],
            dtype=spec.precision.dtype,
            models=self.models,
            background=self._background,
            reads=self._pipeline.reads[name],
            limits=self._pipeline.config.limits,
            dit_cache=self._pipeline.config.dit_cache,
        )

    def blueprint(self, name: str) -> StageBlueprint:
        """What an engine of this stage in another process is made of."""
        context = self.context(name)
        return StageBlueprint(
            self._pipeline.config,
            name,
            self._pipeline.folders.fetched,
            self._pipeline.granted_bytes.get(name),
            context.reads,
            context.device,
            context.dtype,
            self._threads(name),
        )

    def _threads(self, name: str) -> int | None:
        """Processes that compute on the CPU share its cores out: with more threads than cores each waits for others."""
        if not is_cpu(self.devices[name]):
            return None
        on_cpu = [spec.stage for each, spec in self._pipeline.specs.items() if is_cpu(self.devices[each])]
        num_processes = len({stage.name if runs_apart(stage) else None for stage in on_cpu})
        return max(1, current_threads() // num_processes)

    def _executor_of(self, stage: StageConfig) -> str:
        """Stages on several devices have a thread each, so that no device waits for another."""
        if stage.executor != "auto":
            return stage.executor
        return "thread" if len(set(self.devices.values())) > 1 else "inline"
