"""What tests of music requests share: the configuration files of an ACE-Step folder, the stage that reads requests,
audio and audio codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from vllm_omni import Audio, DiffusionParams, OmniRequest
from vllm_omni.config.schema import LimitsConfig, OmniConfig, StageConfig
from vllm_omni.engine.base import Activity, EngineContext, ReadPorts
from vllm_omni.messages import StageDone, StageEvent, StageTask
from vllm_omni.models.ace_step.prompt.options import MusicPromptOptions
from vllm_omni.models.ace_step.prompt.spec import MusicPromptSpec
from vllm_omni.models.ace_step.request import MusicRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

RATE, HOP, POOL = 16_000, 640, 4
TEXTS = frozenset({"caption", "lyrics", "plain_caption", "audio_codes", "music"})
EVERYTHING = TEXTS | {"source_audio", "reference_audio"}


def save_folder(folder: Path, vae: dict[str, Any] | None = None, pool: int | None = POOL) -> Path:
    """The configuration files of an ACE-Step folder: stereo, 16 kHz, 25 latent frames a second, 4 of them a code."""
    config = {"sampling_rate": RATE, "audio_channels": 2, "downsampling_ratios": [4, 4, 5, 8], **(vae or {})}
    files: dict[str, Any] = {"model_index.json": {"_class_name": "AceStepPipeline"}, "vae/config.json": config}
    if pool is not None:
        files["audio_token_detokenizer/config.json"] = {"pool_window_size": pool}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def sound(seconds: float = 2.0, rate: int = RATE, channels: int = 2) -> Audio:
    """Another tone in every channel."""
    times = np.arange(round(rate * seconds)) / rate
    return Audio(np.stack([0.3 * np.sin(600 * (k + 1) * times) for k in range(channels)]).astype(np.float32), rate)


def codes(count: int) -> str:
    return "".join(f"<|audio_code_{7 * index}|>" for index in range(count))


class Prompter:
    """One stage, and who reads it."""

    def __init__(
        self,
        folder: Path,
        reads: frozenset[str] = EVERYTHING,
        limits: LimitsConfig | None = None,
        inputs: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        config = OmniConfig(limits=limits or LimitsConfig())
        stage = StageConfig("prompt", "music_prompt", str(folder), inputs or {}, options=MusicPromptOptions(**options))
        self.spec, self.reads, self.woken = MusicPromptSpec(stage, config, ModelFolders()), ReadPorts(reads), Event()
        cpu, background = torch.device("cpu"), Background(self.woken.set)
        self.engine = self.spec.load(
            EngineContext(cpu, torch.float32, ModelPool(), background, self.reads, config.limits)
        )

    def check(
        self, params: DiffusionParams | None = None, *, prompt: Any = "calm piano", **fields: Any
    ) -> MusicRequest:
        return self.task(params, prompt=prompt, **fields).prepared  # type: ignore[no-any-return]

    def task(self, params: DiffusionParams | None = None, *, prompt: Any = "calm piano", **fields: Any) -> StageTask:
        request, params = OmniRequest(prompt=prompt, fields=fields), params or DiffusionParams()
        return StageTask(request, "prompt", params, prepared=self.spec.check(request, params, self.reads))

    def events(self, count: int) -> list[StageEvent]:
        """Steps until so many have come, waiting for what is decoded in the background."""
        found = self.engine.step()
        while len(found) < count:
            if self.engine.activity() is Activity.PENDING:
                assert self.woken.wait(30)
                self.woken.clear()
            found += self.engine.step()
        return found

    def payload(self, params: DiffusionParams | None = None, **fields: Any) -> Any:
        self.engine.submit(self.task(params, **fields))
        (event,) = self.events(1)
        assert isinstance(event, StageDone) and self.engine.activity() is Activity.IDLE
        return event.payload

    def music(self, params: DiffusionParams | None = None, **fields: Any) -> Any:
        return self.payload(params, **fields).meta["music"]
