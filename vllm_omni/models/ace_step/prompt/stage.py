"""The running `music_prompt` stage: from a checked request to all that the stages of ACE-Step read.

Formatting takes no time; audio that a request brings is decoded in the background while other requests are answered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.base import Activity, EngineContext, StageEngine
from vllm_omni.engine.boundary import stage_error
from vllm_omni.errors import OmniError
from vllm_omni.media.audio_files import Samples
from vllm_omni.media.audio_input import read_audio
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageTask
from vllm_omni.models.ace_step.geometry import MusicGeometry
from vllm_omni.models.ace_step.prompt.request_reader import read_caption
from vllm_omni.models.ace_step.prompt.texts import (
    INSTRUCTIONS,
    format_caption,
    format_lyrics,
    format_metas,
    format_planner_prompt,
)
from vllm_omni.models.ace_step.request import MusicRequest
from vllm_omni.payload import StagePayload
from vllm_omni.worker.background import BackgroundJob, Stop

REQUEST_NAMES = {"source_audio": "audio", "reference_audio": "reference_audio"}  # port -> how the caller calls it


@dataclass(frozen=True, slots=True)
class MusicPromptJob:
    """A task that waits for its answer."""

    task: StageTask
    decoding: BackgroundJob[dict[str, Samples]] | None  # None where the request brings no audio

    @property
    def is_ready(self) -> bool:
        return self.decoding is None or self.decoding.is_done


class MusicPromptEngine(StageEngine):
    """Tasks are answered one per step, in the order in which they came; those whose audio is still being decoded are
    passed over until it is done.
    """

    def __init__(self, name: str, geometry: MusicGeometry, context: EngineContext) -> None:
        self._name = name
        self._geometry = geometry
        self._limits = context.limits
        self._background = context.background
        self._device = context.device
        self._jobs: dict[str, MusicPromptJob] = {}

    def submit(self, task: StageTask) -> None:
        asked: MusicRequest = task.prepared
        decoding = None
        if asked.given_audio:
            decoding = self._background.begin(lambda stop: decode(asked, self._geometry, self._limits, stop))
        self._jobs[task.request_id] = MusicPromptJob(task, decoding)

    def step(self) -> list[StageEvent]:
        job = self._next_ready()
        if job is None:
            return []
        request_id = job.task.request_id
        del self._jobs[request_id]
        try:
            return [StageDone(self._payload(job), {"steps": 1})]
        except Exception as error:
            wrapped = error if isinstance(error, OmniError) else stage_error(self._name, error)
            return [StageFailed(request_id, wrapped)]

    def abort(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        if job is not None and job.decoding is not None:
            job.decoding.cancel()

    def activity(self) -> Activity:
        if self._next_ready() is not None:
            return Activity.BUSY
        return Activity.PENDING if self._jobs else Activity.IDLE

    def get_stats(self) -> Mapping[str, Any]:
        return {"queued": len(self._jobs)}

    def _next_ready(self) -> MusicPromptJob | None:
        return next((job for job in self._jobs.values() if job.is_ready), None)

    def _payload(self, job: MusicPromptJob) -> StagePayload:
        asked: MusicRequest = job.task.prepared
        if "prompt" in job.task.inputs:
            asked = dataclasses.replace(asked, caption=read_caption(job.task.inputs["prompt"], self._limits))
        decoded = {} if job.decoding is None else job.decoding.result()
        tensors = {port: torch.from_numpy(samples).to(self._device) for port, samples in decoded.items()}
        meta = {**format_texts(asked), "music": asked.outline.to_json()}
        return StagePayload(job.task.request_id, self._name, tensors, meta)


def decode(asked: MusicRequest, geometry: MusicGeometry, limits: LimitsConfig, stop: Stop) -> dict[str, Samples]:
    """The audio that a request brings, by port: float32 [channels, n] at the autoencoder's rate."""
    return {
        port: read_audio(
            source,
            sample_rate=geometry.sample_rate,
            channels=geometry.channels,
            limits=limits,
            name=REQUEST_NAMES[port],
            stop=stop,
        )
        for port, source in asked.given_audio.items()
    }


def format_texts(asked: MusicRequest) -> dict[str, str]:
    """The value of every text port; `audio_codes` is empty where the request brings none."""
    facts = (asked.bpm, asked.timesignature, asked.keyscale, asked.outline.duration_s)
    metas = format_metas(*facts)
    instruction = INSTRUCTIONS[asked.outline.task_type] if asked.instruction is None else asked.instruction
    return {
        "caption": format_caption(instruction, asked.caption, metas),
        "plain_caption": format_caption(INSTRUCTIONS["text2music"], asked.caption, metas),
        "lyrics": format_lyrics(asked.language, asked.lyrics),
        "planner_prompt": format_planner_prompt(asked.caption, asked.lyrics, *facts),
        "audio_codes": asked.audio_codes,
    }
