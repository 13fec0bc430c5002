"""What is known of a `music_prompt` stage before it runs: its ports, and what a request asks of it. No weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import EngineContext, ReadPorts, StageSpec, model_folder
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.models.ace_step.folder import AceStepFolder
from vllm_omni.models.ace_step.geometry import MusicGeometry
from vllm_omni.models.ace_step.prompt.options import MEDIA_KEYS, MusicPromptOptions
from vllm_omni.models.ace_step.prompt.request_reader import MusicRequestReader
from vllm_omni.models.ace_step.prompt.stage import MusicPromptEngine
from vllm_omni.models.ace_step.request import MusicRequest
from vllm_omni.params import DiffusionParams, StageParams
from vllm_omni.payload import DataSpec, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders

TEXT_PORTS = ("caption", "lyrics", "plain_caption", "planner_prompt", "audio_codes")


class MusicPromptSpec(StageSpec):
    """Stage kind `music_prompt`. The caption is the request's prompt, or what an edge brings to the port `prompt`. Of
    the parameters it reads `duration_s`; the others are for the stage that makes the audio.
    """

    options_type = MusicPromptOptions
    params_type = DiffusionParams

    def __init__(self, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> None:
        super().__init__(stage, config, folders)
        folder = model_folder(stage, folders, "the folder of an AceStepPipeline")
        self.geometry = MusicGeometry.from_folder(AceStepFolder(folder))
        self._options: MusicPromptOptions = stage.options if stage.options is not None else MusicPromptOptions()
        self.request_keys = self._options.request_keys
        self.media_keys = self.request_keys & MEDIA_KEYS
        if stage.defaults:
            raise ConfigError(
                f"defaults: got {', '.join(stage.defaults)}, but this stage takes none; set default_duration_s here "
                "and the rest at the stage that makes the sound"
            )
        audio = TensorSpec((self.geometry.channels, "n"))
        texts = {port: TextSpec() for port in TEXT_PORTS}
        self.signature = StageSignature(
            inputs={"prompt": TextSpec()},
            outputs={**texts, "music": DataSpec("music"), "source_audio": audio, "reference_audio": audio},
            required_inputs=frozenset({"prompt"} & stage.inputs.keys()),  # the request's own is no stand-in for it
            meta=frozenset(),
        )

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> MusicRequest:
        """The whole request, headers of audio included. Where an edge brings the caption it is empty until then."""
        self._check_own_params(request)
        if not isinstance(params, DiffusionParams):
            raise InvalidRequestError(f"params: got {type(params).__name__}, expected DiffusionParams")
        prompt = "" if "prompt" in self.stage.inputs else request.prompt
        return MusicRequestReader(self.geometry, self._options, self.limits, reads).read(request, params, prompt)

    def load(self, context: EngineContext) -> MusicPromptEngine:
        return MusicPromptEngine(self.stage.name, self.geometry, context)

    def _check_own_params(self, request: OmniRequest) -> None:
        """Refuses what is set for this stage by its name and would not be read."""
        name = self.stage.name
        own = request.params.get(name) if isinstance(request.params, Mapping) else None
        for field in dataclasses.fields(own) if own is not None else ():
            if field.name != "duration_s" and getattr(own, field.name) is not None:
                raise InvalidRequestError(
                    f"params[{name!r}].{field.name}: this stage reads duration_s alone; set the rest for the stage "
                    "that makes the sound"
                )
