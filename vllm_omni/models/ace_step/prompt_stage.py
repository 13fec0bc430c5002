"""The stage kind `music_prompt`: from a request's words, numbers and sounds to all that the stages of ACE-Step read.

It has no weights and takes no time, save for decoding the sounds that a request brings.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import EngineContext, MemoryPlan, StageDone, StageEngine, StageEvent, StageFailed, StageTask
from vllm_omni.engine.boundary import stage_error
from vllm_omni.errors import ConfigError, InvalidRequestError, OmniError
from vllm_omni.media.audio_input import read_audio
from vllm_omni.models.ace_step.prompt_options import MusicModel, MusicPromptOptions
from vllm_omni.models.ace_step.request import MusicRequest, MusicRequestReader
from vllm_omni.models.ace_step.texts import (
    INSTRUCTIONS,
    format_caption,
    format_lyrics,
    format_metas,
    format_planner_prompt,
)
from vllm_omni.params import DiffusionParams, StageParams
from vllm_omni.payload import DataSpec, StagePayload, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import resolve_model_folder

TEXT_PORTS = ("caption", "lyrics", "plain_caption", "planner_prompt", "audio_codes")


class MusicPromptEngine(StageEngine):
    """Checks a request whole before it is admitted (headers of sounds included), and formats it when its turn comes.

    The caption is the request's prompt, or what an edge brings to the port `prompt`. Of the parameters it reads
    `duration_s`; the others are for the stage that makes the sound.
    """

    options_type = MusicPromptOptions
    params_type = DiffusionParams

    @classmethod
    def signature(cls, stage: StageConfig) -> StageSignature:
        model = MusicModel.of(_folder(stage))
        if stage.defaults:
            raise ConfigError(
                f"defaults: got {', '.join(stage.defaults)}, but this stage takes none; set default_duration_s here "
                "and the rest at the stage that makes the sound"
            )
        sound = TensorSpec((model.channels, "n"))
        texts = {port: TextSpec() for port in TEXT_PORTS}
        return StageSignature(
            inputs={"prompt": TextSpec()},
            outputs={**texts, "music": DataSpec("music"), "source_audio": sound, "reference_audio": sound},
            required_inputs=frozenset({"prompt"} & stage.inputs.keys()),  # the request's own is no stand-in for it
            meta=frozenset(),
        )

    @classmethod
    def plan_memory(cls, stage: StageConfig, config: OmniConfig) -> MemoryPlan:
        return MemoryPlan()

    @classmethod
    def request_keys(cls, stage: StageConfig) -> frozenset[str]:
        options: MusicPromptOptions = stage.options
        return options.request_keys

    def __init__(self, stage: StageConfig, context: EngineContext) -> None:
        self._stage = stage
        self._device = context.device
        self._limits = context.config.limits
        self._wanted = context.wanted
        self._model = MusicModel.of(_folder(stage))
        self._reader = MusicRequestReader(self._model, stage.options, context.config.limits, context.wanted)
        self._tasks: deque[StageTask] = deque()

    def check(self, request: OmniRequest, params: StageParams) -> None:
        self._check_own_params(request)
        self._read(request, params, "" if "prompt" in self._stage.inputs else request.prompt)

    def submit(self, task: StageTask) -> None:
        self._tasks.append(task)

    def step(self) -> list[StageEvent]:
        """One request: sounds may be long."""
        if not self._tasks:
            return []
        task = self._tasks.popleft()
        try:
            return [StageDone(self._payload(task), {"steps": 1})]
        except Exception as error:
            wrapped = error if isinstance(error, OmniError) else stage_error(self._stage.name, error)
            return [StageFailed(task.request_id, wrapped)]

    def abort(self, request_id: str) -> None:
        self._tasks = deque(task for task in self._tasks if task.request_id != request_id)

    def has_work(self) -> bool:
        return bool(self._tasks)

    def get_stats(self) -> dict[str, Any]:
        return {"queued": len(self._tasks)}

    def _check_own_params(self, request: OmniRequest) -> None:
        """Refuses what is set for this stage by its name and would not be read."""
        name = self._stage.name
        own = request.params.get(name) if isinstance(request.params, Mapping) else None
        for field in dataclasses.fields(own) if own is not None else ():
            if field.name != "duration_s" and getattr(own, field.name) is not None:
                raise InvalidRequestError(
                    f"params[{name!r}].{field.name}: this stage reads duration_s alone; set the rest for the stage "
                    "that makes the sound"
                )

    def _read(self, request: OmniRequest, params: StageParams, prompt: object) -> MusicRequest:
        if not isinstance(params, DiffusionParams):
            raise InvalidRequestError(f"params: got {type(params).__name__}, expected DiffusionParams")
        return self._reader.read(request, params, prompt)

    def _payload(self, task: StageTask) -> StagePayload:
        asked = self._read(task.request, task.params, task.inputs.get("prompt", task.request.prompt))
        sounds = {"source_audio": asked.audio, "reference_audio": asked.reference_audio}
        tensors = {port: self._decode(port, source) for port, source in sounds.items() if source is not None}
        return StagePayload(task.request_id, self._stage.name, tensors, {**format_texts(asked), "music": asked.music()})

    def _decode(self, port: str, source: object) -> Tensor:
        """float32 [channels, n] at the autoencoder's rate."""
        samples = read_audio(
            source,
            sample_rate=self._model.sample_rate,
            channels=self._model.channels,
            limits=self._limits,
            name="audio" if port == "source_audio" else port,
        )
        return torch.from_numpy(samples).to(self._device)


def format_texts(asked: MusicRequest) -> dict[str, str]:
    """The value of every text port; `audio_codes` is empty where the request brings none."""
    facts = (asked.bpm, asked.timesignature, asked.keyscale, asked.duration_s)
    metas = format_metas(*facts)
    instruction = INSTRUCTIONS[asked.task_type] if asked.instruction is None else asked.instruction
    return {
        "caption": format_caption(instruction, asked.caption, metas),
        "plain_caption": format_caption(INSTRUCTIONS["text2music"], asked.caption, metas),
        "lyrics": format_lyrics(asked.language, asked.lyrics),
        "planner_prompt": format_planner_prompt(asked.caption, asked.lyrics, *facts),
        "audio_codes": asked.audio_codes,
    }


def _folder(stage: StageConfig) -> Path:
    if stage.model is None:
        raise ConfigError(f"stages.{stage.name}.model: missing; expected the folder of an AceStepPipeline")
    return resolve_model_folder(stage.model)
