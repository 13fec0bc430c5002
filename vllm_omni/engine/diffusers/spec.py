"""What is known of a `diffusers` stage before its pipeline is loaded: the folder's JSON, the pipeline's signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import EngineContext, MemoryPlan, ReadPorts, StageSpec, model_folder
from vllm_omni.engine.diffusers.call import PipelineCall
from vllm_omni.engine.diffusers.options import DiffusersOptions
from vllm_omni.engine.diffusers.pipeline_class import given_kind, gives_soundtrack, part_names, pipeline_class
from vllm_omni.engine.diffusers.pipeline_folder import INDEX, PipelineFolder
from vllm_omni.engine.diffusion.checks import diffusion_params
from vllm_omni.errors import ConfigError
from vllm_omni.params import DiffusionParams, StageParams
from vllm_omni.payload import StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders

if TYPE_CHECKING:
    from vllm_omni.engine.diffusers.engine import DiffusersEngine

PORTS = {
    "image": TensorSpec(("N", "H", "W", 3)),
    "audio": TensorSpec(("N", "channels", "n")),
    "video": TensorSpec(("N", "n", "H", "W", 3)),
    "soundtrack": TensorSpec(("N", "channels", "n")),
}


class DiffusersSpec(StageSpec):
    """Stage kind `diffusers`. Reads the request's prompt, or the text that an edge brings to `prompt`."""

    options_type = DiffusersOptions
    params_type = DiffusionParams

    def __init__(self, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> None:
        super().__init__(stage, config, folders)
        options: DiffusersOptions = DiffusersOptions() if stage.options is None else stage.options
        folder = model_folder(stage, folders, "a diffusers pipeline folder")
        self.folder = PipelineFolder(folder, stage.variant)
        self.pipeline_type = self._pipeline_type(options.pipeline)
        self.pipeline_name = self.pipeline_type.__name__
        self.imports = (f"diffusers:{self.pipeline_name}",)
        self.folder.check_left_out(part_names(self.pipeline_type))
        self._check_accelerate()
        given = given_kind(self.pipeline_type)
        self.output = options.output or given or "image"  # a class that does not say what it gives makes pictures
        self.call = PipelineCall(self.pipeline_type, self.output, config.limits, self.folder.media_format())
        self.request_keys, self.media_keys = self.call.request_keys, self.call.media_keys
        has_sound = self.output == "video" and gives_soundtrack(self.pipeline_type)
        self.ports = (self.output, "soundtrack") if has_sound else (self.output,)
        if self.output == "video":
            self.frame_rate = self.call.fps(DiffusionParams().with_defaults(stage.defaults))
        self.signature = StageSignature(
            inputs={"prompt": TextSpec()},
            outputs={port: PORTS[port] for port in self.ports},
            required_inputs=frozenset(stage.inputs) & {"prompt"},  # a prompt that has an edge comes from nowhere else
            results=frozenset(self.ports),
        )

    def load(self, context: EngineContext) -> DiffusersEngine:
        from vllm_omni.engine.diffusers.engine import DiffusersEngine

        return DiffusersEngine(self, context)

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> None:
        whole = self.with_fields(request, diffusion_params(params))
        self.call.check(request, whole, reads_prompt="prompt" not in self.stage.inputs)

    def with_fields(self, request: OmniRequest, params: DiffusionParams) -> DiffusionParams:
        """The parameters of the stage with what the prompt's dict says beside them."""
        return self.call.with_fields(request, params, request.params_for(self.stage.name, DiffusionParams))

    def draws(self, params: StageParams) -> bool:
        return self.call.takes_seed

    def plan_memory(self) -> MemoryPlan:
        return MemoryPlan(weights_bytes=self.folder.weights_bytes(self.precision.dtype))

    def published_dtype(self) -> torch.dtype | None:
        return self.folder.published_dtype()

    def weights_key(self) -> tuple[str, ...]:
        return (self.stage.kind, str(self.folder.path.resolve()), self.folder.variant or "")

    def job_size(self, request: OmniRequest, params: StageParams, prepared: object) -> float:
        return self.call.job_size(self.with_fields(request, diffusion_params(params)))

    def note(self) -> str:
        files = f", {self.folder.variant} files" if self.folder.variant else ""
        made = f"{self.output}{self._shown_rate()}{files}"
        return (
            f"{self.pipeline_name} of diffusers, hosted as it is (gives {made}); requests run one after another; its"
            " memory plan counts weights alone"
        )

    def _shown_rate(self) -> str:
        """What a request for a video gets that does not say how fast it is to be."""
        sound = " with sound" if "soundtrack" in self.ports else ""
        return "" if self.frame_rate is None else f"{sound}, {self.frame_rate:g} frames a second"

    def _pipeline_type(self, chosen: str | None) -> Any:
        if chosen is not None:
            return pipeline_class(chosen)
        return pipeline_class(self.folder.named_class, f"{self.folder.path / INDEX}: _class_name")

    def _check_accelerate(self) -> None:
        """diffusers loads models that keep some weights in float32 with the library `accelerate` alone."""
        import diffusers
        from diffusers.utils import is_accelerate_available

        for name, (_, kind) in self.folder.components.items():
            model = getattr(diffusers, kind, None)
            if getattr(model, "_keep_in_fp32_modules", None) and not is_accelerate_available():
                raise ConfigError(
                    f"{self.folder.path / name}: diffusers loads a {kind} with the library accelerate alone, which is"
                    " not installed: pip install accelerate"
                )
