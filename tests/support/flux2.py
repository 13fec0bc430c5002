"""Small random FLUX.2 [klein] folders in the published format, and engines over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from support.ar import make_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_omni.messages import StageTask
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest

TEXT_WIDTH = 48
HEADS, HEAD_DIM = 2, 32


def random_transformer(seed: int = 0, **overrides: Any) -> Flux2Transformer2DModel:
    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    model = Flux2Transformer2DModel(**{**config, **overrides}).eval().requires_grad_(False)
    for parameter in model.parameters():
        is_norm = parameter.ndim == 1  # of queries and keys, whose attention must not be flat
        torch.nn.init.normal_(parameter, mean=1.5 if is_norm else 0.0, std=0.12)
    return model


def random_vae() -> AutoencoderKLFlux2:
    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval().requires_grad_(False)


def states(length: int, seed: int) -> torch.Tensor:
    """[length, TEXT_WIDTH]"""
    return torch.randn(length, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def random_pipeline(folder: Path, *, keeps_references: bool = False, **overrides: Any) -> Any:
    """A pipeline without a text encoder (states are given), saved into `folder`."""
    is_distilled = overrides.pop("is_distilled", False)
    kind = Flux2KleinKVPipeline if keeps_references else Flux2KleinPipeline
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    options = {} if keeps_references else {"is_distilled": is_distilled}
    pipeline = kind(sampler, random_vae(), None, None, random_transformer(**overrides), **options)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def whole_pipeline(folder: Path) -> Path:
    """A checkpoint with every part."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=TEXT_WIDTH // 3,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = (sampler, random_vae(), Qwen3ForCausalLM(config), make_tokenizer(), random_transformer())
    Flux2KleinPipeline(*parts).save_pretrained(folder)
    return folder


def task(
    request_id: str, params: DiffusionParams, length: int = 7, seed: int = 0, *, is_guided: bool = False
) -> StageTask:
    inputs = {"prompt_embeds": states(length, seed)}
    if is_guided:
        inputs["negative_prompt_embeds"] = states(9, 1000)
    return StageTask(OmniRequest(prompt="words", request_id=request_id), "image", params, inputs)


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Blocks of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)[:height, :width])
