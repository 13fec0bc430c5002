"""Tiny random pipelines of diffusers by their class, made from `tiny_parts`: every class takes what its signature asks
for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from support.ar import make_tokenizer
from support.tiny_parts import TEXT_WIDTH, clip_config, clip_tokenizer, qwen3, scheduler, t5, unet, vae, xl_unet
from transformers import CLIPTextModel, CLIPTextModelWithProjection

FLUX_BLOCKS: dict[str, Any] = {  # of Flux, and of Chroma, which is made of the same
    "patch_size": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": [4, 4, 8],
}


def stable_diffusion(kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    given = {
        "vae": vae(),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        **parts,
    }
    return made(kind, given, requires_safety_checker=False)


def stable_diffusion_xl(kind: str = "StableDiffusionXLPipeline", **parts: Any) -> Any:
    given = {
        "vae": vae(),
        "text_encoder": CLIPTextModel(clip_config()),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config()),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": xl_unet(),
        "scheduler": scheduler(),
        **parts,
    }
    return made(kind, given)


def flux(kind: str = "FluxPipeline", **parts: Any) -> Any:
    in_channels = parts.pop("in_channels", 16)
    given = {
        **flow_parts(),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": make_tokenizer(),
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=in_channels, out_channels=16, pooled_projection_dim=TEXT_WIDTH, **FLUX_BLOCKS
        ),
        **parts,
    }
    return made(kind, given)


def made(kind: str, parts: dict[str, Any], **options: Any) -> Any:
    """The pipeline with those of the parts and options that its class takes."""
    import inspect

    pipeline_type = getattr(diffusers, kind)
    wanted = inspect.signature(pipeline_type.__init__).parameters
    given = {name: value for name, value in {**parts, **options}.items() if name in wanted}
    for part in given.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline_type(**given)


def save(pipeline: Any, folder: Path, **options: Any) -> Any:
    """Saved, and as it comes back from there, as users of diffusers load it."""
    pipeline.save_pretrained(folder, **options)
    loaded = type(pipeline).from_pretrained(folder, variant=options.get("variant"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def flow_parts() -> dict[str, Any]:
    """What stands with a transformer that is trained by flow matching."""
    latents = vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False)
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": latents}


def t5_parts() -> dict[str, Any]:
    return {"text_encoder": t5(), "tokenizer": make_tokenizer()}


def sd3(kind: str) -> Any:
    parts = {
        **flow_parts(),
        "text_encoder": CLIPTextModelWithProjection(clip_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config()),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5(),
        "tokenizer_3": make_tokenizer(),
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT_WIDTH,
        ),
        "image_encoder": None,
        "feature_extractor": None,
    }
    return made(kind, parts)


def chroma(kind: str) -> Any:
    parts = {
        **flow_parts(),
        **t5_parts(),
        "transformer": diffusers.ChromaTransformer2DModel(
            in_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
            approximator_num_channels=16,
            **FLUX_BLOCKS,
        ),
        "image_encoder": None,
        "feature_extractor": None,
    }
    return made(kind, parts)


def pixart(kind: str) -> Any:
    parts = {
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
        "vae": vae(),
        **t5_parts(),
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=TEXT_WIDTH,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            use_additional_conditions=False,
        ),
    }
    return made(kind, parts)


def aura_flow(kind: str) -> Any:
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": vae(),
        **t5_parts(),
        "transformer": diffusers.AuraFlowTransformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=TEXT_WIDTH,
            pos_embed_max_size=256,
        ),
    }
    return made(kind, parts)


def z_image(kind: str) -> Any:
    from support.dit import TEXT_WIDTH as STATES_WIDTH
    from support.dit import random_transformer, random_vae

    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": random_vae(),
        "text_encoder": qwen3(hidden_size=STATES_WIDTH, num_hidden_layers=3),
        "tokenizer": make_tokenizer(),
        "transformer": random_transformer(axes_lens=[1024, 64, 64]),
    }
    return made(kind, parts)


def deep_floyd(kind: str) -> Any:
    parts = {
        **t5_parts(),
        "unet": unet(
            in_channels=3,
            out_channels=6,
            cross_attention_dim=TEXT_WIDTH,
            encoder_hid_dim=TEXT_WIDTH,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ),
        "scheduler": diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", variance_type="learned_range"
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
    }
    return made(kind, parts, requires_safety_checker=False)


def dit(kind: str) -> Any:
    parts = {
        "transformer": diffusers.DiTTransformer2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=4,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        "vae": vae(),
        "scheduler": scheduler(),
    }
    return made(kind, parts)
