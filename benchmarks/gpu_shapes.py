"""Shapes that are published, and the same in tiny for a look on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_speech import TINY_CODEC, TINY_TALKER

QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
QWEN3_06B = {
    **QWEN3,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "max_position_embeddings": 40960,
}
QWEN3_4B = {
    **QWEN3_06B,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
TINY_QWEN3 = {
    **QWEN3_06B,
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
DEEP_QWEN3 = {**TINY_QWEN3, "num_hidden_layers": 28}  # whose layers up to the 27th are read
Z_IMAGE = {
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
TINY_Z_IMAGE = {
    **Z_IMAGE,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": [8, 12, 12],
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
TINY_VAE = {**VAE, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
KLEIN_4B = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
TINY_KLEIN = {
    **KLEIN_4B,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 96,
    "axes_dims_rope": (8, 8, 8, 8),
}
KLEIN_VAE: dict[str, Any] = {}  # the published one is the class's own
TINY_KLEIN_VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
PROMPT = "a red circle left of a blue square, a yellow ring below a green triangle"


@dataclass(frozen=True, slots=True)
class Size:
    """How large everything is."""

    num_sequences: int
    lengths: tuple[int, int]  # least and most tokens, in and out
    decode_batches: tuple[int, ...]
    decode_tokens: int
    max_model_len: int
    pixels: int
    steps: int
    repeats: int
    language_model: dict[str, Any] = field(repr=False)
    z_image: dict[str, dict[str, Any]] = field(repr=False)
    klein: dict[str, dict[str, Any]] = field(repr=False)
    peer_tokens: int  # that transformers writes, which takes a while
    speeches: tuple[int, ...]  # at once
    frames: int  # of a speech
    speech: dict[str, dict[str, Any]] = field(repr=False)


PUBLISHED = Size(
    num_sequences=256,
    lengths=(100, 1024),
    decode_batches=(1, 8, 64),
    decode_tokens=128,
    max_model_len=4096,
    pixels=1024,
    steps=9,
    repeats=2,
    language_model=QWEN3_06B,
    z_image={"transformer": Z_IMAGE, "vae": VAE, "text_encoder": QWEN3_4B},
    klein={"transformer": KLEIN_4B, "vae": KLEIN_VAE},
    peer_tokens=32,
    speeches=(1, 8),
    frames=100,
    speech={"talker": {}, "codec": {}},
)
DRY = Size(
    num_sequences=3,
    lengths=(4, 9),
    decode_batches=(1, 2),
    decode_tokens=4,
    max_model_len=64,
    pixels=64,
    steps=2,
    repeats=1,
    language_model=TINY_QWEN3,
    z_image={"transformer": TINY_Z_IMAGE, "vae": TINY_VAE, "text_encoder": DEEP_QWEN3},
    klein={"transformer": TINY_KLEIN, "vae": TINY_KLEIN_VAE},
    peer_tokens=3,
    speeches=(1, 2),
    frames=3,
    speech={"talker": TINY_TALKER, "codec": TINY_CODEC},
)
