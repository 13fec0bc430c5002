"""Small random ACE-Step folders in the published format, and what tests need around them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AceStepTransformer1DModel, AutoencoderOobleck

CHANNELS = 8
TEXT_WIDTH = 40


def random_transformer(seed: int = 0, **overrides: Any) -> AceStepTransformer1DModel:
    """Weights wide enough that every part matters."""
    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        in_channels=3 * CHANNELS,
        audio_acoustic_hidden_dim=CHANNELS,
        patch_size=2,
        sliding_window=5,
        encoder_hidden_size=TEXT_WIDTH,
        is_turbo=False,
    )
    return shaken(AceStepTransformer1DModel(**{**config, **overrides}))


def random_vae(strides: list[int], **overrides: Any) -> AutoencoderOobleck:
    """Loud enough that every layer of it is heard."""
    torch.manual_seed(1)
    config: dict[str, Any] = dict(
        encoder_hidden_size=2 * CHANNELS,
        downsampling_ratios=strides,
        channel_multiples=[1, 2, 2, 3][: len(strides)],
        decoder_channels=2 * CHANNELS,
        decoder_input_channels=CHANNELS,
        audio_channels=2,
        sampling_rate=800,
    )
    return shaken(AutoencoderOobleck(**{**config, **overrides}))


def shaken(module: Any, scale: float = 0.08) -> Any:
    """Every parameter random; norms around one, the lengths of normed weights so that no layer fades or explodes."""
    for name, parameter in module.named_parameters():
        center = 0.7 if name.endswith("weight_g") else float("norm" in name and name.endswith("weight"))
        torch.nn.init.normal_(parameter, center, scale)
    return module.eval().requires_grad_(False)
