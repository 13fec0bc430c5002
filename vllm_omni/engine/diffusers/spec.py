"""What is known of a `diffusers` stage before its pipeline is loaded: the folder's JSON, the pipeline's signature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import EngineContext, MemoryPlan, ReadPorts, StageSpec, model_folder
from vllm_omni.engine.diffusers.call import PipelineCall
from vllm_omni.engine.diffusers.options import DiffusersOptions
from vllm_omni.engine.diffusers.pipeline_folder import hosted_bytes, pipeline_class, pipeline_name
from vllm_omni.engine.diffusion.checks import diffusion_params
from vllm_omni.params import DiffusionParams, StageParams
from vllm_omni.payload import StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.device import resolve_device, resolve_dtype
from vllm_omni.utils.files import ModelFolders

if TYPE_CHECKING:
    from vllm_omni.engine.diffusers.engine import DiffusersEngine

PORTS = {"image": TensorSpec(("N", "H", "W", 3)), "audio": TensorSpec(("N", "channels", "n"))}


class DiffusersSpec(StageSpec):
    """Stage kind `diffusers`. Reads the request's prompt, or the text that an edge brings to `prompt`."""

    options_type = DiffusersOptions
    params_type = DiffusionParams

    def __init__(self, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> None:
        super().__init__(stage, config, folders)
        options: DiffusersOptions = stage.options
        self.folder = model_folder(stage, folders, "a diffusers pipeline folder")
        self.output = options.output
        self.pipeline_name = pipeline_name(self.folder, options.pipeline)
        self.call = PipelineCall(pipeline_class(self.pipeline_name), options.output, config.limits)
        self.signature = StageSignature(
            inputs={"prompt": TextSpec()},
            outputs={options.output: PORTS[options.output]},
            required_inputs=frozenset(stage.inputs) & {"prompt"},  # a prompt that has an edge comes from nowhere else
            results=frozenset({options.output}),
        )

    def load(self, context: EngineContext) -> DiffusersEngine:
        from vllm_omni.engine.diffusers.engine import DiffusersEngine

        return DiffusersEngine(self, context)

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> None:
        self.call.check(request, diffusion_params(params), reads_prompt="prompt" not in self.stage.inputs)

    def draws(self, params: StageParams) -> bool:
        return self.call.takes_seed

    def plan_memory(self) -> MemoryPlan:
        dtype = resolve_dtype(self.stage.dtype, resolve_device(self.stage.device))
        return MemoryPlan(weights_bytes=hosted_bytes(self.folder, dtype))

    def weights_key(self) -> tuple[str, ...]:
        return (self.stage.kind, str(self.folder.resolve()))

    def job_size(self, request: OmniRequest, params: StageParams, prepared: object) -> float:
        return self.call.job_size(diffusion_params(params))

    def note(self) -> str:
        return "requests run one after another; its memory plan counts weights alone"
