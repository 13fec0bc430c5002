"""Small random FLUX.2 [klein] folders in the published format, and engines over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)

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
        torch.nn.init.normal_(parameter, std=0.12)
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
