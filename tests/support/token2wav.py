"""Engines over the token2wav of a tiny Qwen2.5-Omni folder, tasks for them, and what transformers makes of the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.dit import cache_keys
from support.speech import SPEAKERS, tiny_config, tiny_reference
from torch import Tensor

from vllm_omni import registry
from vllm_omni.config.schema import DiTCacheConfig, OmniConfig, StageConfig
from vllm_omni.engine.base import (
    Activity,
    EngineContext,
    ReadPorts,
    StageEngine,
    StageSpec,
)
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.engine.diffusion.options import DiTOptions
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.messages import ChunkConsumed, StageDone, StageEvent, StageRows, StageTask
from vllm_omni.models.qwen2_5_omni.token2wav.trajectory import frame_noise
from vllm_omni.params import DiffusionParams, SamplingParams
from vllm_omni.payload import StageSignature, StreamChunk, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

SPEECH_YAML = """\
name: speech
stages:
  talker: {kind: spell}
  speech: {kind: dit, model: FOLDER, part: token2wav, inputs: {codes: talker.codes}}
outputs: [speech]
"""
MEL, REPEATS, HOP, NUM_CODES = 20, 2, 30, 60
SAMPLES = REPEATS * HOP  # of a code
PUBLISHED_BIGVGAN = dict(upsample_rates=[5, 3, 2, 2, 2, 2], upsample_kernel_sizes=[11, 7, 4, 4, 4, 4])


@dataclass(frozen=True, slots=True)
class NoOptions:
    """No key of its own."""


class SpellSpec(StageSpec):
    """Codes for another stage; never loaded."""

    options_type = NoOptions
    params_type = SamplingParams

    def __init__(self, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> None:
        super().__init__(stage, config, folders)
        self.signature = StageSignature(outputs={"codes": TensorSpec(("T",))})

    def load(self, context: EngineContext) -> StageEngine:
        raise NotImplementedError


def register_spell() -> None:
    """Adds the row; may be called twice."""
    registry.register("stage kind", "spell", f"{__name__}:SpellSpec")


def stage_config(
    folder: Path, policy: str = "none", threshold: float | None = None, dtype: str = "auto", **options: Any
) -> StageConfig:
    cache = cache_keys(policy, threshold)
    return StageConfig(
        name="speech",
        kind="dit",
        model=str(folder),
        inputs={"codes": "talker.codes"},
        dtype=dtype,
        options=DiTOptions(**{"part": "token2wav", "cache": cache, **options}),
    )


def spec(folder: Path, **options: Any) -> DiffusionSpec:
    return DiffusionSpec(stage_config(folder, **options), OmniConfig(), ModelFolders())


def engine(
    folder: Path,
    *,
    wanted: Sequence[str] = ("audio",),
    streamed: Sequence[str] = (),
    pool: ModelPool | None = None,
    **options: Any,
) -> DiffusionEngine:
    reads = ReadPorts(frozenset(wanted), frozenset(streamed))
    models, dit_cache = ModelPool() if pool is None else pool, DiTCacheConfig(max_memory_mb=64.0)
    stage = spec(folder, **options)
    dtype = stage.precision.dtype
    return stage.load(EngineContext(torch.device("cpu"), dtype, models, Background(), reads, dit_cache=dit_cache))


def codes(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, NUM_CODES, (length,), generator=torch.Generator().manual_seed(seed))


def params(points: int = 3, guidance: float | None = None, seed: int = 0, **rest: Any) -> DiffusionParams:
    return DiffusionParams(num_inference_steps=points, guidance_scale=guidance, seed=seed, **rest)


def task(
    request_id: str, given: Tensor | StreamChunk, value: DiffusionParams, fields: Mapping[str, Any] | None = None
) -> StageTask:
    chunk = given if isinstance(given, StreamChunk) else StreamChunk(given, is_last=True)
    request = OmniRequest(prompt="words", request_id=request_id, fields=fields or {})
    return StageTask(request, "speech", value, {"codes": chunk})


def chunks(rows: Tensor, first: int, size: int, left: int, ahead: int) -> list[StreamChunk]:
    """As a streamed edge cuts them: new rows first, size, size, ... with context on both sides."""
    found, start = [], 0
    while start < len(rows):
        stop = min(start + (size if start else first), len(rows))
        is_last = stop + ahead >= len(rows)
        stop = len(rows) if is_last else stop
        low, high = max(0, start - left), min(stop + ahead, len(rows))
        found.append(StreamChunk(rows[low:high], start, start - low, high - stop, is_last))
        start = stop
    return found


@dataclass
class Ran:
    """What a stage gave: the last event of each request, and by request the rows and how many chunks were consumed."""

    last: dict[str, StageEvent] = field(default_factory=dict)
    rows: dict[str, list[StageRows]] = field(default_factory=dict)
    consumed: dict[str, int] = field(default_factory=dict)

    def sound(self, request_id: str) -> Tensor:
        """[N, 1, n]"""
        event = self.last[request_id]
        assert isinstance(event, StageDone), event
        return event.payload.tensors["audio"]


def run(stage: DiffusionEngine, ran: Ran | None = None) -> Ran:
    """Steps until there is no work; integrity is checked after every step."""
    ran = Ran() if ran is None else ran
    while stage.activity() is Activity.BUSY:
        for event in stage.step():
            assert not isinstance(ran.last.get(event.request_id), StageDone), "an event after the final one"
            if isinstance(event, StageRows):
                ran.rows.setdefault(event.request_id, []).append(event)
            elif isinstance(event, ChunkConsumed):
                ran.consumed[event.request_id] = ran.consumed.get(event.request_id, 0) + 1
            ran.last[event.request_id] = event
        stage.check_integrity()
    return ran


def sound(stage: DiffusionEngine, rows: Tensor, value: DiffusionParams, **fields: Any) -> Tensor:
    """[1, n] of one request that has the stage for itself."""
    stage.submit(task("alone", rows, value, fields))
    return run(stage).sound("alone")[0]


def streamed_sound(stage: DiffusionEngine, parts: Sequence[StreamChunk], value: DiffusionParams) -> Tensor:
    """[1, n], put together from the rows of all chunks."""
    stage.submit(task("streamed", parts[0], value))
    for part in parts[1:]:
        stage.feed("streamed", "codes", part)
    return torch.cat([event.rows for event in run(stage).rows["streamed"]]).T


def reference_sound(
    rows: Tensor, value: DiffusionParams, speaker: str = SPEAKERS[0], seed: int = 0, **token2wav: Any
) -> Tensor:
    """[1, n] of transformers' model, from the same noise."""
    model = tiny_reference(seed, tiny_config(**token2wav))
    voice = model.speaker_map[speaker]
    noise = frame_noise(value.seed or 0, 0, len(rows) * REPEATS, MEL)
    scale = {} if value.guidance_scale is None else {"guidance_scale": value.guidance_scale}
    with torch.no_grad(), mock.patch("torch.randn", lambda *args, **rest: noise[None]):
        wave = model.token2wav(
            rows[None], voice["cond"], voice["ref_mel"], num_steps=value.num_inference_steps or 10, **scale
        )
    return wave.reshape(1, -1)
