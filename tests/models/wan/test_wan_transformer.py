"""The native Wan transformer: what is published fits it, name by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from vllm_omni.errors import ConfigError
from vllm_omni.layers.weights import plan_loading
from vllm_omni.models.wan.config import WanConfig
from vllm_omni.models.wan.text.encoder import UMT5Encoder
from vllm_omni.models.wan.transformer import WanTransformer

COMMON: dict[str, Any] = {
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "freq_dim": 256,
    "image_dim": None,
    "num_layers": 30,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
PUBLISHED = {  # transformer/config.json of
    # https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B-Diffusers
    "Wan2.2-TI2V-5B": {"ffn_dim": 14336, "in_channels": 48, "num_attention_heads": 24, "out_channels": 48},
    # https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    "Wan2.1-T2V-1.3B": {"ffn_dim": 8960, "in_channels": 16, "num_attention_heads": 12, "out_channels": 16},
}
# text_encoder/config.json of both
UMT5_XXL = dict(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
BILLIONS = {"Wan2.2-TI2V-5B": 5.0, "Wan2.1-T2V-1.3B": 1.42}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_fill_the_model(name: str) -> None:
    """Nothing missing, nothing left over."""
    config = {**COMMON, **PUBLISHED[name]}
    with torch.device("meta"):
        published, ours = WanTransformer3DModel(**config), WanTransformer(WanConfig.from_dict(config))
    shapes = {key: tuple(value.shape) for key, value in published.state_dict().items()}
    assert plan_loading(ours, shapes, name).keys() == shapes.keys()
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.02)


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_published_text_encoder_fills_its_module(is_tied: bool) -> None:
    """Files hold the embeddings once or twice."""
    with torch.device("meta"):
        published, ours = UMT5EncoderModel(UMT5Config(**UMT5_XXL)), UMT5Encoder(UMT5Config(**UMT5_XXL))
    shapes = {key: tuple(value.shape) for key, value in published.state_dict().items()}
    shapes["encoder.embed_tokens.weight"] = shapes["shared.weight"]
    if is_tied:
        del shapes["encoder.embed_tokens.weight"]
    assert plan_loading(ours, shapes, "text_encoder").keys() == shapes.keys() - {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_dim", 1280), ("patch_size", [2, 2, 2]), ("in_channels", 36), ("qk_norm", None), ("num_layers", 0)],
)
def test_what_is_not_computed_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        WanConfig.from_dict({**COMMON, **PUBLISHED["Wan2.1-T2V-1.3B"], key: value})
