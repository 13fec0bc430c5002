"""Small random Qwen-Image folders in the published format, and what a stage over them is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from support.ar import make_tokenizer
from support.dit import TEXT_WIDTH
from support.language_models import TINY
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# Of Qwen/Qwen-Image, scheduler/scheduler_config.json.
SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
PIPELINES = {kind.__name__: kind for kind in (QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline)}

ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}


def random_transformer(seed: int = 0, **overrides: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        in_channels=32,
        out_channels=8,
        num_layers=3,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 8, 12),
    )
    model = QwenImageTransformer2DModel(**{**config, **overrides}).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.12)
    return model


def random_vae(num_halvings: int = 3, base_dim: int = 4) -> AutoencoderKLQwenImage:
    """Of 2 ** num_halvings pixels a latent. It scales latents unlike the published one, by other numbers a channel."""
    torch.manual_seed(1)
    vae = AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=8,
        dim_mult=[1, 2, *([4] * (num_halvings - 1))],
        num_res_blocks=1,
        temperal_downsample=[False] + [True] * (num_halvings - 1),
        latents_mean=[0.1 * index - 0.3 for index in range(8)],
        latents_std=[0.7 + 0.1 * index for index in range(8)],
    )
    return vae.eval().requires_grad_(False)


def random_pipeline(
    folder: Path, kind: str = "QwenImagePipeline", *, num_halvings: int = 3, base_dim: int = 4, **transformer: Any
) -> Any:
    """A pipeline without a text encoder (states are given), saved into `folder`."""
    parts = {"processor": None} if "Edit" in kind else {}
    pipeline = PIPELINES[kind](
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=random_vae(num_halvings, base_dim),
        text_encoder=None,
        tokenizer=None,
        transformer=random_transformer(**transformer),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def whole_pipeline(folder: Path) -> QwenImagePipeline:
    """With every part, as diffusers writes it."""
    torch.manual_seed(0)
    text = {**TINY, "rope_parameters": ROPE, "max_position_embeddings": 2048}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**VISION, "intermediate_size": 32})
    pipeline = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        random_vae(),
        Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False),
        make_tokenizer(),
        random_transformer(joint_attention_dim=TINY["hidden_size"]),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
