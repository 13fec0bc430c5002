"""Small random pipeline folders in diffusers' format, and the stage that hosts them."""

from __future__ import annotations

import string
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from support.ar import make_tokenizer
from support.dit import TEXT_WIDTH, random_transformer, random_vae
from support.engines import context_of, is_busy, spec_of
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5EncoderModel, T5Tokenizer

from vllm_omni.config.schema import LimitsConfig, OmniConfig, StageConfig
from vllm_omni.engine.base import Activity
from vllm_omni.engine.diffusers.engine import DiffusersEngine
from vllm_omni.engine.diffusers.options import DiffusersOptions
from vllm_omni.messages import StageDone, StageEvent, StageTask
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest

RATE = 1600


def random_stable_audio(folder: Path) -> StableAudioPipeline:
    """2 channels at 1600 Hz, 8 samples a latent frame, 256 frames: up to 1.28 s."""
    torch.manual_seed(0)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    pipeline = StableAudioPipeline(
        AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=4,
            audio_channels=2,
            sampling_rate=RATE,
        ),
        T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=8),
        T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16),
        StableAudioDiTModel(
            sample_size=256,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=32,
            cross_attention_input_dim=16,
        ),
        CosineDPMSolverMultistepScheduler(),
    )
    return saved(pipeline, folder)


def random_z_image(folder: Path) -> ZImagePipeline:
    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=320,
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    )
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        random_vae(),
        Qwen3ForCausalLM(text),
        make_tokenizer(),
        random_transformer(axes_lens=[1024, 64, 64]),
    )
    return saved(pipeline, folder)


def saved(pipeline: Any, folder: Path) -> Any:
    """The pipeline as it comes back from disk, weights not so small that the prompt would not matter."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipeline.save_pretrained(folder)
    loaded = type(pipeline).from_pretrained(folder, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def engine(
    folder: Path,
    output: str,
    *,
    pipeline: str | None = None,
    inputs: Mapping[str, str] | None = None,
    limits: LimitsConfig | None = None,
) -> DiffusersEngine:
    options = DiffusersOptions(output=output, pipeline=pipeline)
    stage = StageConfig(name="stage", kind="diffusers", model=str(folder), inputs=inputs or {}, options=options)
    config = OmniConfig(limits=limits or LimitsConfig())
    loaded: DiffusersEngine = spec_of(stage, config).load(context_of(config, whole={output}))
    return loaded


def task(request_id: str, prompt: str, params: DiffusionParams, **request: Any) -> StageTask:
    return StageTask(OmniRequest(prompt=prompt, request_id=request_id, **request), "stage", params, {})


def run(stage: DiffusersEngine) -> list[StageEvent]:
    """All events until there is no work; every step reports something."""
    events: list[StageEvent] = []
    while stage.activity() is not Activity.IDLE:
        events += step(stage)
    return events


def step(stage: DiffusersEngine) -> list[StageEvent]:
    """One step, as soon as what the next request brings is read."""
    while not is_busy(stage):
        assert stage.activity() is Activity.PENDING
        time.sleep(0.001)
    events = stage.step()
    assert events, "a step without an event"
    return events


def made(events: list[StageEvent], port: str) -> dict[str, torch.Tensor]:
    """What each request made; all must be done."""
    done = [event for event in events if isinstance(event, StageDone)]
    assert {event.request_id for event in done} == {event.request_id for event in events}, events
    return {event.request_id: event.payload.tensors[port] for event in done}
