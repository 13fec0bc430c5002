"""The tiny random parts that `tiny_pipelines` puts together: tokenizers, encoders, denoisers, VAEs, schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

TEXT_WIDTH = 32
UNET_BLOCKS: dict[str, Any] = {  # of a UNet, and of the ControlNet beside it
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "in_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
XL_BLOCKS: dict[str, Any] = {  # where Stable Diffusion XL's differ
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1),
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
    "cross_attention_dim": 2 * TEXT_WIDTH,
}


def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    vocab = {token: index for index, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    vocab |= {f"{letter}</w>": len(vocab) + index for index, letter in enumerate(letters)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip_config(**rest: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": 256,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 37,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "projection_dim": TEXT_WIDTH,
            "max_position_embeddings": 77,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **rest,
        }
    )


def unet(**rest: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        **{
            **UNET_BLOCKS,
            "sample_size": 32,
            "out_channels": 4,
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **rest,
        }
    )


def xl_unet(**rest: Any) -> diffusers.UNet2DConditionModel:
    return unet(**XL_BLOCKS, **rest)


def vae(**rest: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (32, 32),
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 8,
            "sample_size": 64,
            **rest,
        }
    )


def controlnet(**rest: Any) -> diffusers.ControlNetModel:
    return diffusers.ControlNetModel(**{**UNET_BLOCKS, "conditioning_embedding_out_channels": (16, 32), **rest})


def scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=320, d_model=TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def qwen3(**rest: Any) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            **{
                "vocab_size": 320,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                **rest,
            }
        )
    )


def vision() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            intermediate_size=37,
            patch_size=8,
        )
    )


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
