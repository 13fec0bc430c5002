"""A config read whole, before anything is loaded: the specs of its stages, their graph, and who reads what.

Admission, `vllm-omni check` and the loop all start from it. Reads configuration files and safetensors headers, never
weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vllm_omni import registry
from vllm_omni.config.builder import under
from vllm_omni.config.document import STAGE_KEYS
from vllm_omni.config.graph import StageGraph
from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import ReadPorts, StageSpec
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checkpoint_files import reading
from vllm_omni.utils.files import ModelFolders


class Pipeline:
    """Raises ConfigError naming the config, the whole key, what it got and what was expected."""

    config: OmniConfig  # with the stages alone that some output calls for
    graph: StageGraph
    folders: ModelFolders  # where its models are
    specs: Mapping[str, StageSpec]  # of these stages, in the order of the graph
    reads: Mapping[str, ReadPorts]  # by stage: which of its output ports somebody reads

    def __init__(self, config: OmniConfig, folders: ModelFolders | None = None) -> None:
        """folders: where some of the config's have been looked up already."""
        config.validate()
        folders = folders or ModelFolders()
        try:
            specs = {name: describe_stage(stage, config, folders) for name, stage in config.stages.items()}
            signatures = {name: spec.signature for name, spec in specs.items()}
            self.graph = StageGraph(config.stages, signatures, config.outputs)
        except ConfigError as error:
            raise ConfigError(f"config {config.name!r}: {error}") from error
        self.config = self.graph.without_idle(config)
        self.folders = folders
        self.granted_bytes: dict[str, int] = {}  # by stage that asked for memory: what it has been granted
        self.specs = {name: specs[name] for name in self.graph.order}
        self.reads = {
            name: ReadPorts(self.graph.wanted_ports(name), self.graph.streamed_ports(name)) for name in self.specs
        }

    def grant_memory(self, stage: str, num_bytes: int) -> None:
        """As StageSpec.grant_memory; noted for whoever makes the spec again elsewhere."""
        self.specs[stage].grant_memory(num_bytes)
        self.granted_bytes[stage] = num_bytes


def describe_stage(stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> StageSpec:
    """The spec of one stage; ConfigError that says which, and the whole key."""
    kind: type[StageSpec] = registry.resolve("stage kind", stage.kind)
    try:
        with reading(f"stages.{stage.name}: {stage.model}"):
            spec = kind.describe(stage, config, folders)
            spec.choose_quantization()
            spec.check_offload()
            return spec
    except ConfigError as error:
        known = STAGE_KEYS | {field.name for field in dataclasses.fields(kind.options_type)}
        raise ConfigError(under(f"stages.{stage.name}", str(error), known)) from error
