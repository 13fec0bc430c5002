"""Engines over a tiny speech codec, tasks for them, and what they gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.config.schema import EdgeLike, OmniConfig, StageConfig
from vllm_omni.engine.base import Activity, EngineContext, ReadPorts
from vllm_omni.messages import ChunkConsumed, StageDone, StageEvent, StageFailed, StageRows, StageTask
from vllm_omni.models.qwen3_tts.codec.engine import CodecEngine
from vllm_omni.models.qwen3_tts.codec.options import CodecOptions
from vllm_omni.models.qwen3_tts.codec.spec import SpeechCodecSpec
from vllm_omni.params import SamplingParams
from vllm_omni.payload import StreamChunk
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool


def spec(folder: Path, edge: EdgeLike = "talker.codes", dtype: str = "auto", **options: Any) -> SpeechCodecSpec:
    stage = StageConfig(
        name="speech",
        kind="speech_codec",
        model=str(folder),
        inputs={"codes": edge},
        dtype=dtype,
        options=CodecOptions(**options),
    )
    return SpeechCodecSpec(stage, OmniConfig(), ModelFolders())


def engine(
    folder: Path,
    *,
    whole: Sequence[str] = ("audio",),
    streamed: Sequence[str] = ("audio",),
    pool: ModelPool | None = None,
    **options: Any,
) -> CodecEngine:
    stage = spec(folder, **options)
    models = ModelPool() if pool is None else pool
    reads = ReadPorts(frozenset(whole), frozenset(streamed))
    return stage.load(EngineContext(torch.device("cpu"), stage.precision.dtype, models, Background(), reads))


def chunks(codes: Tensor, sizes: Sequence[int]) -> list[StreamChunk]:
    """Rows of these sizes, the rest in the last chunk."""
    bounds = [0]
    for size in sizes:
        bounds.append(min(bounds[-1] + size, len(codes)))
    bounds.append(len(codes))
    parts = [StreamChunk(codes[low:high], low) for low, high in pairwise(bounds)]
    return [*parts[:-1], replace(parts[-1], is_last=True)]


def task(request_id: str, chunk: StreamChunk, reference: StreamChunk | None = None) -> StageTask:
    request = OmniRequest(prompt="words", request_id=request_id)
    before = {} if reference is None else {"reference_codes": reference}
    return StageTask(request, "speech", SamplingParams(), {"codes": chunk, **before})


@dataclass
class Ran:
    """By request: the audio that was streamed, how many chunks were consumed, and the last event."""

    pieces: dict[str, list[Tensor]] = field(default_factory=dict)
    consumed: dict[str, int] = field(default_factory=dict)
    last: dict[str, StageEvent] = field(default_factory=dict)

    def streamed(self, request_id: str) -> Tensor:
        """[samples]"""
        return torch.cat(self.pieces[request_id])

    def whole(self, request_id: str) -> Tensor:
        """[samples]"""
        done = self.last[request_id]
        assert isinstance(done, StageDone), done
        return done.payload.tensors["audio"][0, 0]

    def error(self, request_id: str) -> str:
        failed = self.last[request_id]
        assert isinstance(failed, StageFailed), failed
        return str(failed.error)


def step(stage: CodecEngine, ran: Ran) -> None:
    """One step; integrity is checked after it."""
    for event in stage.step():
        assert not isinstance(ran.last.get(event.request_id), StageDone | StageFailed), "an event after the final one"
        if isinstance(event, StageRows):
            ran.pieces.setdefault(event.request_id, []).append(event.rows[:, 0])
        elif isinstance(event, ChunkConsumed):
            ran.consumed[event.request_id] = ran.consumed.get(event.request_id, 0) + 1
        ran.last[event.request_id] = event
    stage.check_integrity()


def run(stage: CodecEngine, ran: Ran | None = None) -> Ran:
    """Steps until there is no work."""
    ran = Ran() if ran is None else ran
    while stage.activity() is Activity.BUSY:
        step(stage, ran)
    return ran


def sound(stage: CodecEngine, codes: Tensor) -> Tensor:
    """[samples] of one request that has the stage for itself, its codes whole."""
    stage.submit(task("alone", StreamChunk(codes, is_last=True)))
    return run(stage).whole("alone")
