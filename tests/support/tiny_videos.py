"""Tiny random pipelines of diffusers that make videos, by their class."""

from __future__ import annotations

import importlib.util
from typing import Any

import diffusers
from support.tiny_parts import TEXT_WIDTH, clip_config, clip_tokenizer, image_processor, scheduler, unet, vae, vision
from support.tiny_pipelines import made, t5_parts
from transformers import CLIPTextModel

WAN_LIBRARIES = ("accelerate", "ftfy")  # diffusers loads and runs Wan with these alone
SIDE = 32
NUM_FRAMES = 9  # each of these pipelines makes one more than a multiple of its temporal compression


def has_wan() -> bool:
    return all(importlib.util.find_spec(library) is not None for library in WAN_LIBRARIES)


def ltx(kind: str = "LTXPipeline") -> Any:
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    return made(kind, {**t5_parts(), "vae": autoencoder, "transformer": transformer, "scheduler": flow})


def cogvideox(kind: str = "CogVideoXPipeline") -> Any:
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=TEXT_WIDTH,
        num_layers=1,
        sample_width=SIDE // 8,
        sample_height=SIDE // 8,
        sample_frames=NUM_FRAMES,
        max_text_seq_length=226,
    )
    return made(kind, {**t5_parts(), "vae": autoencoder, "transformer": transformer, "scheduler": scheduler()})


def animate_diff(kind: str = "AnimateDiffPipeline") -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
        use_motion_mid_block=False,
    )
    parts = {
        "vae": vae(),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "motion_adapter": adapter,
        "scheduler": diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        "feature_extractor": image_processor(),
        "image_encoder": vision(),
    }
    return made(kind, parts)


def wan(kind: str = "WanPipeline") -> Any:
    parts = {
        **t5_parts(),
        "vae": diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "transformer": diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=TEXT_WIDTH, freq_dim=32, ffn_dim=32, num_layers=2
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    }
    return made(kind, parts)
