"""The trained parts that turn codes into sound, as transformers' token2wav, and the voice that they know."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniToken2WavConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel

from tools.tiny.speech import train_dit, train_vocoder

SPEAKER = "Reader"


def config() -> dict[str, object]:
    """`token2wav_config` of the published config.json."""
    return {"dit_config": train_dit.CONFIG, "bigvgan_config": train_vocoder.CONFIG}


def trained(runs: Path) -> Qwen2_5OmniToken2WavModel:
    """With the weights of `runs`/dit and `runs`/vocoder, in float32."""
    model = Qwen2_5OmniToken2WavModel(Qwen2_5OmniToken2WavConfig(**config()))
    model.code2wav_dit_model.load_state_dict(load_file(runs / "dit/dit.safetensors"))
    model.code2wav_bigvgan_model.load_state_dict(load_file(runs / "vocoder/vocoder.safetensors"))
    return model.eval()


def voice(runs: Path) -> dict[str, Tensor]:
    """cond [1, 16] and ref_mel [1, T, 80] of the one speaker, for `spk_dict.pt`."""
    return load_file(runs / "dit/speaker.safetensors")


@torch.no_grad()
def spoken(model: Qwen2_5OmniToken2WavModel, known: dict[str, Tensor], codes: Tensor, seed: int) -> Tensor:
    """int64 [n] -> float32 [480 n] at 24 kHz, by the published sampler with its defaults."""
    torch.manual_seed(seed)
    samples: Tensor = model(codes[None], known["cond"], known["ref_mel"])
    return samples
