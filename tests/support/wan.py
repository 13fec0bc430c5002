"""Small random Wan folders in the published format, and what a stage over them is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from support.ar import make_tokenizer
from support.dit import TEXT_WIDTH, states
from transformers import UMT5Config, UMT5EncoderModel

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.base import EngineContext, ReadPorts
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.engine.diffusion.options import DiTOptions
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.messages import StageTask
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

CHANNELS = 8
BOTH = ReadPorts(frozenset({"video", "latents"}))
SCHEDULER: dict[str, Any] = {  # of both published checkpoints, beside `flow_shift`
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
}


def random_transformer(seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=24,
        num_attention_heads=2,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=96,
    )
    model = WanTransformer3DModel(**{**config, **overrides}).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.1)
    return model


def random_vae(is_residual: bool, base_dim: int = 4) -> AutoencoderKLWan:
    """is_residual: as Wan 2.2 has it, its pixels in patches; else as Wan 2.1."""
    torch.manual_seed(1)
    of_patches = dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    vae = AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=base_dim,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1 * index - 0.3 for index in range(CHANNELS)],
        latents_std=[0.7 + 0.1 * index for index in range(CHANNELS)],
        **(of_patches if is_residual else {}),
    )
    return vae.eval().requires_grad_(False)


def random_pipeline(folder: Path, *, is_ti2v: bool = True, sampler: Any = None, text: bool = False) -> WanPipeline:
    """Saved into `folder`. text: with its text encoder; else states are given."""
    pipeline = WanPipeline(
        tokenizer=make_tokenizer() if text else None,
        text_encoder=random_encoder() if text else None,
        vae=random_vae(is_ti2v),
        scheduler=UniPCMultistepScheduler(**SCHEDULER) if sampler is None else sampler,
        transformer=random_transformer(),
        expand_timesteps=is_ti2v,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def random_encoder() -> UMT5EncoderModel:
    torch.manual_seed(2)
    config = UMT5Config(
        vocab_size=512, d_model=TEXT_WIDTH, d_kv=12, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def spec(folder: Path, **options: Any) -> DiffusionSpec:
    stage = StageConfig(
        name="video",
        kind="dit",
        model=str(folder),
        inputs={"prompt_embeds": "text.hidden_states", "negative_prompt_embeds": "negative.hidden_states"},
        options=DiTOptions(**options),
    )
    return DiffusionSpec(stage, OmniConfig(), ModelFolders())


def engine(folder: Path, **options: Any) -> DiffusionEngine:
    context = EngineContext(torch.device("cpu"), torch.float32, ModelPool(), Background(), BOTH)
    return spec(folder, **options).load(context)


def task(request_id: str, params: DiffusionParams, length: int = 7, seed: int = 0) -> StageTask:
    inputs = {"prompt_embeds": states(length, seed)}
    if params.guidance_scale is None or params.guidance_scale > 1:
        inputs["negative_prompt_embeds"] = states(9, 1000)
    return StageTask(OmniRequest(prompt="words", request_id=request_id), "video", params, inputs)


def reference_states(length: int, seed: int) -> torch.Tensor:
    """[1, 512, TEXT_WIDTH]: as the reference pipeline fills a text up."""
    return torch.nn.functional.pad(states(length, seed), (0, 0, 0, 512 - length))[None]


def change_index(folder: Path, **values: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **values}))
